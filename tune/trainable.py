"""The bridge from Ray Tune to `dpsink.training.train`, run in a worker process."""

import logging
from pathlib import Path
from typing import Any

from ray import tune

from dpsink.config import DataConfig, Performance
from dpsink.data import ImageData, load_dataset
from dpsink.errors import InputError
from dpsink.privacy.storage import FencedError
from dpsink.records import Report
from dpsink.training import read_result, set_up, train, use_threads
from tune.fitness import needed_of_node, require_storage
from tune.folder import StudyFolder
from tune.orders import Orders
from tune.versions import require_same
from tune.wire import packed

log = logging.getLogger("dpsink")


def run_trial(config: dict[str, Any], device: str = "cpu") -> None:
    """Trains one trial of a study folder, from its last checkpoint if it has one, reporting to Tune.

    Tune's own checkpoints are not used: the run folder is the durable record, as for `dpsink train`.

    Args:
        config: `folder` of the study, name of the `trial`, `data_root`, `fingerprint` of the study's data, `versions`
            of the driver, `threads`; absolute paths, since Ray changes a worker's working directory.
        device: `cpu`, or `cuda` for the GPU that Ray has given this process.
    """
    folder = StudyFolder(Path(config["folder"]))
    require_storage(folder)
    record = folder.read_trial(config["trial"])
    performance = Performance(device=device, threads=config["threads"])
    use_threads(performance.threads)  # for the data, too
    run = folder.run(record.name)
    ended = read_result(run)
    if ended is not None:  # the process died between the last checkpoint and its report
        tune.report(packed(flat(ended)))
        return
    orders = Orders(folder)
    if orders.stop():
        return
    with needed_of_node():
        require_same(config["versions"])
        set_up(performance)
        data = load_same(record.config.data, Path(config["data_root"]), config["fingerprint"])
    try:
        # A driver that was killed may not have decided on the last report.
        for report in train(
            record.config, data, run, performance=performance, should_stop=orders.stop, tell_again=True
        ):
            tune.report(packed(flat(report)))
    except FencedError as replaced:  # Ray, which gave this process up, no longer listens
        log.warning("%s is another process's by now, and stops here: %s", record.name, replaced)
        raise


def load_same(config: DataConfig, root: Path, fingerprint: str) -> ImageData:
    """The study's data, as this node has them, before a step on them is paid for.

    Raises:
        InputError: they are others, or cannot be read.
    """
    data = load_dataset(config, root=root)
    if data.fingerprint != fingerprint:
        raise InputError(
            f"the data under {root} are not those of the study here; copy them, and of private data the key of "
            "their fingerprint too, to every node"
        )
    return data


def flat(report: Report) -> dict[str, Any]:
    """A report without levels."""
    return {**report.model_dump(exclude={"metrics"}), **report.metrics}
