"""What a machine has to have for any trial of a study: one that lacks it fails whatever it is given."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from dpsink.errors import InputError
from tune.folder import StudyFolder


class UnfitNode(InputError):
    """A node that no trial of the study can run on. The study stops: else its trials would fail there one by one."""


@contextmanager
def needed_of_node() -> Iterator[None]:
    """Turns a mistake that has nothing to do with the trial into UnfitNode, which names the node."""
    try:
        yield
    except InputError as error:
        raise UnfitNode(f"node {socket.gethostname()}: {error}") from None


def require_storage(folder: StudyFolder) -> None:
    """Refuses a node that does not see the study.

    Raises:
        UnfitNode: so it is.
    """
    with needed_of_node():
        if not folder.path.is_dir():
            raise InputError(f"{folder.path} is not there; mount the study's storage")
