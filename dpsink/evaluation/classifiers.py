"""Classifiers trained on synthetic images and tested on real ones (arXiv 2111.01177, Section 5)."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from dpsink.data import LabelledImages, to_unit
from dpsink.errors import InputError

CLASSIFIERS = ("logreg", "mlp", "cnn")
HELD_BACK = 10  # one in ten synthetic samples decides when training stops
LEARNING_RATE = 1e-3  # of Adam
BATCH_SIZE = 64
PATIENCE = 3  # epochs without a better held-back loss
MAX_EPOCHS = 50


def classifier_accuracies(
    synthetic: LabelledImages,
    reference: LabelledImages,
    *,
    classifiers: Sequence[str] = CLASSIFIERS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Accuracy on real images of classifiers that saw only synthetic ones.

    Args:
        synthetic: training images, at least 10.
        reference: real images of the same shape, never trained on.
        classifiers: names out of `CLASSIFIERS`.
        seed: of the split, the initialisation and the order of batches; the result is a function of it.
        device: where they are trained and asked.

    Returns:
        `accuracy_<name>` for each classifier, in [0, 1]; where all three were run, `accuracy`, their mean.

    Raises:
        InputError: an unknown classifier.
    """
    scores = {f"accuracy_{name}": _accuracy(name, synthetic, reference, seed, device) for name in classifiers}
    if set(classifiers) == set(CLASSIFIERS):
        scores["accuracy"] = sum(scores.values()) / len(scores)
    return scores


def build_classifier(name: str, shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """An untrained classifier of images (n, C, H, W) in [-1, 1], giving logits (n, num_classes).

    Args:
        name: `logreg`, `mlp` (100 hidden units) or `cnn`.
        shape: (C, H, W) of an image.
        num_classes: number of classes.

    Raises:
        InputError: an unknown name.
    """
    pixels = math.prod(shape)
    if name == "logreg":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, num_classes))
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 100), nn.ReLU(), nn.Linear(100, num_classes))
    if name == "cnn":
        return build_cnn(shape, num_classes, channels=16, features=128)
    raise InputError(f"classifier {name!r} is not known; choose from {', '.join(CLASSIFIERS)}")


def build_cnn(shape: tuple[int, int, int], num_classes: int, *, channels: int, features: int) -> nn.Sequential:
    """Two convolutions, each halving the image, a hidden layer of `features` units, and the logits."""
    depth, height, width = shape
    return nn.Sequential(
        nn.Conv2d(depth, channels, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * (height // 4) * (width // 4), features),
        nn.ReLU(),
        nn.Linear(features, num_classes),
    )


@torch.enable_grad()
def fit(model: nn.Module, data: LabelledImages, *, seed: int, device: torch.device | str = "cpu") -> None:
    """Trains from scratch in the model's own precision; keeps the epoch that is best on a held-back tenth.

    Global random state is neither read nor changed.

    Args:
        model: maps images (n, C, H, W) in [-1, 1] to logits; its layers are linear or convolutional.
        data: at least 10 images.
        seed: of the split, the initialisation and the order of batches.
        device: where it is trained, and stays.
    """
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)  # on the CPU: every device starts from the same weights
    model.to(device)
    convert_conv2d_weight_memory_format(
        model, torch.channels_last
    )  # in the other, pooling takes thrice as long on a CPU
    held_back, kept = torch.randperm(len(data), generator=generator).tensor_split([len(data) // HELD_BACK])
    training, stopping = (data.take(rows).to(device) for rows in (kept, held_back))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    best_epoch, best_loss, best_state = -1, math.inf, copy.deepcopy(model.state_dict())
    for epoch in range(MAX_EPOCHS):
        _train_epoch(model, training, optimizer, generator)
        loss = functional.cross_entropy(predict(model, stopping.images), stopping.labels).item()
        if loss < best_loss:
            best_epoch, best_loss, best_state = epoch, loss, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch == PATIENCE:
            break
    model.load_state_dict(best_state)
    convert_conv2d_weight_memory_format(model, torch.contiguous_format)  # as it came: it may be saved


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """PyTorch's default initialisation, U(±1/√fan_in), from a local generator."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """Outputs (N, D) of a model, on its device, for uint8 images (N, C, H, W) anywhere, batch by batch."""
    return torch.cat([model(_pixels(batch, model)) for batch in images.split(batch_size)])


def _accuracy(
    name: str, synthetic: LabelledImages, reference: LabelledImages, seed: int, device: torch.device | str
) -> float:
    with torch.device("meta"):  # parameters come from `initialise`, not from global random state
        model = build_classifier(name, synthetic.shape, synthetic.num_classes)
    model.to_empty(device="cpu")
    fit(model, synthetic, seed=seed, device=device)
    predicted = predict(model, reference.images).argmax(dim=1).cpu()
    return (predicted == reference.labels).double().mean().item()


def _train_epoch(
    model: nn.Module, data: LabelledImages, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    for index in torch.randperm(len(data), generator=generator).to(data.images.device).split(BATCH_SIZE):
        batch = data.take(index)
        loss = functional.cross_entropy(model(_pixels(batch.images, model)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _pixels(images: Tensor, model: nn.Module) -> Tensor:
    like = next(model.parameters())
    return to_unit(images.to(like.device)).to(like.dtype)
