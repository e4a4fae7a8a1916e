"""Whether a run goes on with the data that it was trained on.

The fingerprint of the data is in ``data.json`` of the run folder and in every checkpoint (``data`` of its state). A run
that finds other data stops; with ``data.accept_changes=true`` it continues, the journal says what has changed, and the
data is that of the run from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmtrain.config import RunConfig
from mmtrain.data.core.fingerprint import Fingerprint, changes
from mmtrain.errors import UserError
from mmtrain.log import logger
from mmtrain.runs import journal
from mmtrain.runs.folder import RunFolder


@dataclass(frozen=True)
class TrainedOn:
    """The data that is trained on: its number of samples, and its fingerprint; None in what earlier versions wrote."""

    samples: int
    fingerprint: Fingerprint | None


def check_data(
    config: RunConfig,
    run: RunFolder,
    now: TrainedOn,
    found: TrainedOn | None,
    step: int,
    assets: Callable[[], dict[str, Any]],
) -> None:
    """Compare the data of ``now`` with that of the run, and with that of the newest checkpoint, which is of ``step``.

    For rank 0, since it writes: ``assets`` of the new data replace those of the run folder where changes are accepted.

    Raises:
        UserError: when the data is not what the run was trained on, with what changed.
    """
    own, fingerprint = run.data(), now.fingerprint or {}
    different = [] if own is None else changes(own, fingerprint)
    if found is not None and (different or not _accepted_before(run, own)):
        if found.samples != now.samples:
            different.insert(0, f"it was trained on {found.samples} samples, the data now has {now.samples}")
        different += changes(found.fingerprint or {}, fingerprint)
    different = list(dict.fromkeys(different))
    unknown = own is None and (found is None or found.fingerprint is None)
    if different and not config.data.accept_changes:
        raise UserError(
            f"{run.path}: the data is not what the run was trained on:\n  "
            + "\n  ".join(different)
            + "\nRestore the data, start another run with name=…, or continue with the data as it is now:"
            " data.accept_changes=true"
        )
    if different or unknown:
        _record(run, fingerprint, different, step, assets)


def _accepted_before(run: RunFolder, own: Fingerprint | None) -> bool:
    """Whether the data of the run is not that of its checkpoints because a change was accepted since."""
    return own is not None and any(line.get("kind") == "data_changed" for line in journal.read(run.path))


def _record(
    run: RunFolder, data: Fingerprint, different: list[str], step: int, assets: Callable[[], dict[str, Any]]
) -> None:
    if different:
        logger.warning("%s continues with other data (data.accept_changes=true): %s", run.path, "; ".join(different))
        journal.record(run.path, "data_changed", step=step, changes=different)
        run.write_assets(assets())
    else:
        logger.warning(
            "%s is of an earlier version, which kept no fingerprint of its data: whether this is the data it was"
            " trained on cannot be checked. From now on it can",
            run.path,
        )
        journal.record(run.path, "data_recorded", step=step)
    run.write_data(data)
