"""Feature extractors for FID, KID, precision and recall. Values under different extractors do not compare."""

import hashlib
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dpsink.data import LabelledImages
from dpsink.disk import cache_folder
from dpsink.errors import InputError
from dpsink.evaluation.classifiers import build_cnn, fit, predict

ARCHITECTURE = "cnn-8-16-32/1"  # part of the cache key: raise the number when network or training change
FEATURES = 32
BATCH_SIZE = 64
INCEPTION_SHA256_PREFIX = "6726825d"  # also in the file's name

_log = logging.getLogger(__name__)
_built: dict[str, "Extractor"] = {}


@dataclass(frozen=True, eq=False)
class Extractor:
    """A fixed map from images to features.

    Attributes:
        name: `classifier` or `inception`.
        tag: what a run records, with the number of images that it was trained on: `classifier@180`.
        network: uint8 images (n, C, H, W) to features (n, D).
    """

    name: str
    tag: str
    network: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features, float32 (N, D), of uint8 images (N, C, H, W); each row depends on its image only."""
        return torch.cat([self.network(batch) for batch in images.split(BATCH_SIZE)]).float()


def build_extractor(name: str, reference: LabelledImages) -> Extractor:
    """The extractor that a config names: `classifier`, trained on the public `reference`, or `inception`.

    Raises:
        InputError: an unknown name, or Inception's weights are not at hand.
    """
    if name == "classifier":
        return classifier_extractor(reference)
    if name == "inception":
        return inception_extractor()
    raise InputError(f"extractor {name!r} is not known; choose classifier or inception")


def classifier_extractor(reference: LabelledImages, *, seed: int = 0) -> Extractor:
    """The hidden layer, 32 wide, of a small CNN that was trained to classify `reference`.

    Trained once and kept, in the process and under `$XDG_CACHE_HOME/dpsink/extractors` (or `~/.cache`).

    Args:
        reference: real images, public: a hash of them names the cache entry. At least 10.
        seed: of the training.
    """
    key = _key(reference, seed)
    if key not in _built:
        model = _load_or_train(reference, seed, cache_folder("extractors") / f"{key}.safetensors")
        layers = model[:-1]
        # In units of the features' root mean square: how far training went then does not set FID's scale.
        scale = predict(layers, reference.images).square().mean().sqrt()
        _built[key] = Extractor(
            "classifier", f"classifier@{len(reference)}", lambda images: predict(layers, images) / scale
        )
    return _built[key]


def inception_extractor(weights: Path | None = None, *, download: bool = False) -> Extractor:
    """torch-fidelity's Inception-v3, 2,048 features, the one that published FIDs use; grey images become RGB.

    Args:
        weights: the file `weights-inception-2015-12-05-6726825d.pth`; by default, in torch hub's cache.
        download: fetch the file to that place where it is missing (92 MB).

    Raises:
        InputError: the file is missing, is something else, or cannot be downloaded.
    """
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not path.is_file():
        if not download:
            raise InputError(
                f"{path}: no Inception weights there; download {URL_INCEPTION_V3} to it, or use `classifier`"
            )
        _download(path)
    return _load_inception(path)


def _load_or_train(reference: LabelledImages, seed: int, path: Path) -> nn.Sequential:
    with torch.device("meta"):  # parameters come from the cache or from `fit`, not from global random state
        model = build_cnn(reference.shape, reference.num_classes, channels=8, features=FEATURES)
    # In float64 the network is the same, once rounded, for any number of threads; in float32 rounding grows
    # over the steps, and two workers would measure with two extractors.
    model.double().to_empty(device="cpu")
    if not _read_entry(path, model):
        fit(model, reference, seed=seed)
        _write_entry(path, model)
    return model.float()


def _key(reference: LabelledImages, seed: int) -> str:
    facts = (reference.shape, len(reference), reference.num_classes, seed, ARCHITECTURE, torch.__version__)
    digest = hashlib.sha256(repr(facts).encode())
    digest.update(reference.images.numpy().tobytes())
    digest.update(reference.labels.numpy().tobytes())
    return digest.hexdigest()


def _read_entry(path: Path, model: nn.Module) -> bool:
    """Loads a cache entry; False where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as entry:
            state = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118 (not a dict)
            if (entry.metadata() or {}).get("sha256") != _checksum(state):
                return False
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _write_entry(path: Path, model: nn.Module) -> None:
    """Writes a cache entry whole or not at all; a cache that cannot be written costs time, not the trial."""
    state = model.state_dict()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
            draft.write(save(state, {"sha256": _checksum(state)}))
        os.replace(draft.name, path)
    except OSError as error:
        _log.warning("%s: the extractor is not cached (%s)", path, error.strerror)


def _checksum(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(state)).hexdigest()


def _download(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256_PREFIX, progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{URL_INCEPTION_V3} cannot be downloaded to {path} ({error}); fetch it by hand") from None


@lru_cache(maxsize=1)
def _load_inception(path: Path) -> Extractor:
    try:
        # torch-fidelity unpickles without a guard: refuse a file that holds more than tensors first.
        torch.load(path, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, TypeError, ValueError) as error:
        # Torch's own words on a refused pickle advise to load it all the same.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = (
            "it holds more than tensors" if refused else (str(error).strip() or type(error).__name__).splitlines()[0]
        )
        raise InputError(
            f"{path}: not torch-fidelity's Inception weights ({reason}); fetch {URL_INCEPTION_V3}"
        ) from None
    return Extractor("inception", "inception", lambda images: network(images.expand(-1, 3, -1, -1))[0])
