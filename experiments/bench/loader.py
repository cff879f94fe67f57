"""Private batches as people load them: PIL items, transforms, a Poisson sampler, a DataLoader."""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from experiments.bench.plain import Batch
from experiments.bench.subjects import Setting, random_images


class PilImages(Dataset):
    """Each item through a PIL image, as torchvision's data sets make them."""

    def __init__(self, setting: Setting) -> None:
        data = random_images(setting.records, setting.shape)
        self.pixels, self.labels = data.images.permute(0, 2, 3, 1).squeeze(-1).numpy(), data.labels
        middle = [0.5] * setting.shape[0]
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(middle, middle)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.transform(Image.fromarray(self.pixels[index]))
        assert isinstance(image, Tensor)
        return image, int(self.labels[index])


class PoissonSampler(Sampler):
    """Batches that each record joins independently: N uniforms a batch, as in Opacus."""

    def __init__(self, records: int, sample_rate: float) -> None:
        self.records, self.sample_rate = records, sample_rate

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield (torch.rand(self.records) < self.sample_rate).nonzero().flatten().tolist()


def poisson_batches(setting: Setting) -> Iterator[Batch]:
    """Batches without end, loaded in this process: workers cost more than they save here."""
    sampler = PoissonSampler(setting.records, setting.batch / setting.records)
    for images, labels in DataLoader(PilImages(setting), batch_sampler=sampler):
        yield Batch(images.flatten(1), labels)
