"""Feature extractors for FID, KID, precision and recall. Values under different extractors do not compare."""

import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from dpsink.data import LabelledImages
from dpsink.disk import cache_folder
from dpsink.errors import InputError
from dpsink.evaluation.classifiers import build_cnn, fit, predict
from dpsink.evaluation.kept import Tensors, digest, recall

ARCHITECTURE = "cnn-8-16-32/1"  # part of the cache key: raise the number when network or training change
FEATURES = 32
BATCH_SIZE = 64
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256_PREFIX = "6726825d"  # also in the file's name
WEIGHTS_VARIABLE = "DPSINK_INCEPTION_WEIGHTS"

_built: dict[tuple[str, str], "Extractor"] = {}


@dataclass(frozen=True, eq=False)
class Extractor:
    """A fixed map from images to features.

    Attributes:
        name: `classifier` or `inception`.
        tag: what a run records, with the number of images that it was trained on: `classifier@180`.
        network: uint8 images (n, C, H, W) on `device` to features (n, D).
        digest: names the map in the cache of features (`reference.py`); None keeps nothing there.
        device: where it computes.
    """

    name: str
    tag: str
    network: Callable[[Tensor], Tensor]
    digest: str | None = None
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features, float32 (N, D) on the CPU, of uint8 images (N, C, H, W); each row depends on its image only."""
        return torch.cat([self.network(batch.to(self.device)).float().cpu() for batch in images.split(BATCH_SIZE)])


def build_extractor(
    name: str, reference: LabelledImages, *, weights: Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor that a config names: `classifier`, trained on the public `reference`, or `inception`.

    Args:
        weights: as for `find_weights`.
        device: where it computes.

    Raises:
        InputError: an unknown name, or Inception's weights are not at hand.
    """
    if name == "classifier":
        return classifier_extractor(reference, device=device)
    if name == "inception":
        return inception_extractor(weights, device=device)
    raise InputError(f"extractor {name!r} is not known; choose classifier or inception")


def require_extractor(name: str, *, weights: Path | None = None, download: bool = False) -> None:
    """Refuses an extractor that needs a file which is not there, before anything is paid for.

    Args:
        weights, download: as for `find_weights`.

    Raises:
        InputError: Inception's weights are not there, or cannot be downloaded.
    """
    if name == "inception":
        find_weights(weights, download=download)


def find_weights(weights: Path | None = None, *, download: bool = False) -> Path:
    """The file of Inception's weights, `weights-inception-2015-12-05-6726825d.pth`.

    Args:
        weights: where it lies; by default at `$DPSINK_INCEPTION_WEIGHTS`, else in torch hub's cache.
        download: fetch it to that place where it is missing (92 MB).

    Raises:
        InputError: it is not there, or cannot be downloaded.
    """
    path = weights or _usual_place()
    if not path.is_file():
        if not download:
            raise InputError(
                f"{path}: no Inception weights there; give --inception-weights or ${WEIGHTS_VARIABLE}, fetch "
                f"{INCEPTION_URL} (--download), or use `classifier`"
            )
        _download(path)
    return path


def _usual_place() -> Path:
    named = os.environ.get(WEIGHTS_VARIABLE)
    return Path(named) if named else Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name


def classifier_extractor(reference: LabelledImages, *, seed: int = 0, device: torch.device | str = "cpu") -> Extractor:
    """The hidden layer, 32 wide, of a small CNN that was trained to classify `reference`.

    Trained once and kept, in the process and under `$XDG_CACHE_HOME/dpsink/extractors` (or `~/.cache`).

    Args:
        reference: real images, public: a hash of them names the cache entry. At least 10.
        seed: of the training, which is on the CPU: one extractor for all devices.
        device: where it computes.

    Raises:
        ReleaseRefused: private images.
    """
    key = digest(reference, seed, ARCHITECTURE, torch.__version__)
    if (key, str(device)) not in _built:
        layers = _load_or_train(reference, seed, cache_folder("extractors") / f"{key}.safetensors")[:-1].to(device)
        # In units of the features' root mean square: how far training went then does not set FID's scale.
        scale = predict(layers, reference.images).square().mean().sqrt()
        _built[key, str(device)] = Extractor(
            "classifier", f"classifier@{len(reference)}", lambda images: predict(layers, images) / scale, key, device
        )
    return _built[key, str(device)]


def inception_extractor(weights: Path | None = None, *, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's Inception-v3, 2,048 features, the one that published FIDs use; grey images become RGB.

    Args:
        weights: as for `find_weights`.
        device: where it computes.

    Raises:
        InputError: the file is missing, or is something else.
    """
    return _load_inception(find_weights(weights), str(device))


def _load_or_train(reference: LabelledImages, seed: int, path: Path) -> nn.Sequential:
    with torch.device("meta"):  # parameters come from the cache or from `fit`, not from global random state
        model = build_cnn(reference.shape, reference.num_classes, channels=8, features=FEATURES)
    # In float64 the network is the same, once rounded, for any number of threads; in float32 rounding grows
    # over the steps, and two workers would measure with two extractors.
    model.double().to_empty(device="cpu")

    def train() -> Tensors:
        fit(model, reference, seed=seed)
        return model.state_dict()

    recall(path, train, valid=model.load_state_dict)
    return model.float()


def _download(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256_PREFIX, progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{INCEPTION_URL} cannot be downloaded to {path} ({error}); fetch it by hand") from None


@lru_cache(maxsize=1)
def _load_inception(path: Path, device: str) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # it takes seconds

    try:
        # The published weights are a pickle, which torch-fidelity reads without a guard: before it does, a file that
        # holds more than tensors is refused, and then any other than the published one.
        torch.load(path, map_location="cpu", weights_only=True)
        with path.open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        if not weights.startswith(INCEPTION_SHA256_PREFIX):  # an FID by others would pass for one by these
            raise ValueError(f"its SHA-256 does not begin with {INCEPTION_SHA256_PREFIX}")
        with torch.random.fork_rng(devices=[]):
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, TypeError, ValueError) as error:
        # Torch's own words on a refused pickle advise to load it all the same.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = (
            "it holds more than tensors" if refused else (str(error).strip() or type(error).__name__).splitlines()[0]
        )
        raise InputError(f"{path}: not torch-fidelity's Inception weights ({reason}); fetch {INCEPTION_URL}") from None
    network.to(device)
    return Extractor(
        "inception", "inception", lambda images: network(images.expand(-1, 3, -1, -1))[0],
        digest("inception", weights, torch.__version__), device,
    )  # fmt: skip
