"""Weights & Biases, when asked for. A failure is said once and the run goes on with its JSON lines."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from mmtrain.config import RunConfig
from mmtrain.runs.folder import RunFolder
from mmtrain.train.trackers.base import BestEffortSink, values

logger = logging.getLogger("mmtrain")

#: How long W&B may keep the run waiting for its server, in seconds: at the start, and for the last of its data at the
#: end. The end is the shorter: a job that is preempted has little time. What is left stays in the run folder.
_START_SECONDS = 60.0
_END_SECONDS = 30.0


class WandbRun(BestEffortSink):
    """One W&B run over all restarts of a run folder.

    Its id is in ``wandb_id.txt`` from the first start on, so that a run killed before its first checkpoint keeps it,
    and in every checkpoint (``known_id``), so that it outlives the loss of the file.
    """

    title = "W&B"
    cure = "Try tracking.wandb=offline, or set WANDB_API_KEY"

    def __init__(self, config: RunConfig, run: RunFolder, known_id: str | None, restart: int) -> None:
        super().__init__()
        self.config, self.folder, self.restart = config, run.path, restart
        self.run_id = _lasting_id(run.wandb_id_file, known_id)
        self._run: Any = None
        self._try(self._start)

    def _start(self) -> None:
        import wandb

        mode: Any = self.config.tracking.wandb
        if mode == "online" and not has_key():
            mode = "offline"
            logger.warning(
                "tracking.wandb=online, but there is no W&B key: this run is recorded in %s. Set WANDB_API_KEY or call"
                " `wandb login`; `mmtrain runs sync %s` uploads it",
                self.folder / "wandb",
                self.folder,
            )
        # left behind where the server took the run on: only then must it know the run
        known = self.folder / "wandb" / f"online-{self.run_id}"
        self._run = wandb.init(
            project=self.config.tracking.project,
            name=self.config.name,
            id=self.run_id,
            group=self.config.tracking.group or self.config.name,
            job_type=f"restart {self.restart}",
            # "must": a run that is gone from the server is not started anew under the same name, without its past
            resume="must" if mode == "online" and known.exists() else "allow",
            mode=mode,
            dir=str(self.folder),
            config=dataclasses.asdict(self.config),
            settings=wandb.Settings(
                silent=True,
                init_timeout=_START_SECONDS,
                finish_timeout=_END_SECONDS,
                # its own diff of the checkout would hold secrets: code.diff of the run folder leaves them out
                disable_code=True,
            ),
        )
        if mode == "online":
            known.touch()
        # steps that are taken again after a restart are logged again, since W&B appends rows and takes none back: they
        # fall on the same place of this axis, with the same loss
        self._run.define_metric("*", step_metric="step")
        for path in (self.folder / "code.json", self.folder / "code.diff"):
            if path.is_file():  # a copy: of a file elsewhere W&B makes a link, with a warning
                copy = shutil.copy(path, self._run.dir)
                self._run.save(copy, base_path=self._run.dir, policy="now", glob=False)

    def _log(self, line: dict[str, Any]) -> None:
        self._run.log({"step": line["step"], **values(line)})

    def _image(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Image(str(path))})

    def _finish(self) -> None:
        self._run.finish()


def has_key() -> bool:
    """Whether W&B finds a key by itself: in the environment, the netrc file, or its settings. It would ask, else."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="mmtrain", prompt=False, update_session=False) is not None


def _lasting_id(file: Path, known: str | None) -> str:
    """The id in ``file``, which is written where it is not there."""
    if file.is_file() and (found := file.read_text().strip()):
        return found
    run_id = known or secrets.token_hex(4)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(run_id + "\n")
    os.replace(partial, file)
    return run_id
