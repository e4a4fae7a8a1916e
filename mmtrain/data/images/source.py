"""Images in WebDataset tar shards, read by offset."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.data.core.source import Empty, Fault
from mmtrain.data.images.cache import ShardCache, Unreachable, file_system, said
from mmtrain.data.images.photo import Photo, Undecodable
from mmtrain.data.images.shards import ShardFiles, find_shards
from mmtrain.data.images.tar_index import Damaged, ShardIndex, index_shards
from mmtrain.data.images.transforms import build_transform, new_tensor
from mmtrain.errors import UserError

#: So many samples after a faulty one are tried in its place.
_STAND_INS = 64


class ImageShards:
    """Source of {"image": float32 (B, C, S, S) normalised, "label": int64 (B,)} from tar shards.

    ``augment`` and the further keyword arguments are those of ``transforms.build_transform``. ``num_classes`` and
    ``classes`` come from ``meta.json`` in the dataset's root (the folder above the split) and are None without one.

    ``skip``: what cannot be used does not stop the run. In training the next sample that can be used stands in for it
    (the same one whatever the world size); in evaluation it is left out of the batch. Each is told in ``take_faults``.
    """

    moved = ("image",)

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        train: bool,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = 3,
        augment: str = "none",
        skip: bool = False,
        cache: ShardCache | None = None,
        **augment_options: Any,
    ) -> None:
        self.transform = build_transform(
            train, image_size, augment, mean=mean, std=std, channels=channels, **augment_options
        )
        self.channels, self.train, self.skip = channels, train, skip
        shards = index_shards(find_shards(path, missing=skip), skip=skip, cache=cache)
        self.paths = [shard.path for shard in shards]
        self.block_sizes = [len(shard) for shard in shards]
        self._faults = _missing(shards)
        # One array each over all shards; the keys stay on disk, they are only needed to report a fault.
        self._offsets = np.concatenate([shard.offsets for shard in shards])
        self._sizes = np.concatenate([shard.sizes for shard in shards])
        self.labels: NDArray[np.int64] = np.concatenate([shard.labels for shard in shards])
        self._ends = np.cumsum(self.block_sizes)
        self.cache, self._files = cache, ShardFiles(shards, cache)
        self.classes = read_classes(_meta_of(self.paths[0]))
        self.num_classes = None if self.classes is None else len(self.classes)
        if self.num_classes is not None and int(self.labels.max(initial=-1)) >= self.num_classes:
            first = int(np.argmax(self.labels >= self.num_classes))
            raise UserError(
                f"{self._name(first)}: label {self.labels[first]}, but meta.json lists {self.num_classes} classes "
                "(0 is the first): the shards and meta.json do not belong together; prepare the dataset again"
            )

    def __len__(self) -> int:
        return len(self._offsets)

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> dict[str, torch.Tensor]:
        return self.finish(self.load(indices, keys))

    def load(
        self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None, empty: Empty = new_tensor
    ) -> dict[str, torch.Tensor]:
        """As ``fetch``, with the pixels not yet normalised. In evaluation faulty samples are missing, see "kept"."""
        photos: list[Any] = [None] * len(indices)
        used = np.array(indices, dtype=np.int64)
        for place in np.argsort(indices, kind="stable").tolist():  # along the shards, whatever the shuffle
            photos[place], used[place] = self._usable(int(indices[place]))
        while True:
            kept = np.array([photo is not None for photo in photos], dtype=bool)
            try:
                pixels = self.transform.pixels(
                    [photo for photo in photos if photo is not None], None if keys is None else keys[kept], empty
                )
            except Undecodable as error:
                place = int(np.flatnonzero(kept)[error.place])
                self._note(int(used[place]), error)
                photos[place], used[place] = self._stand_in(int(used[place]))
                continue
            batch = {"image": pixels, "label": torch.from_numpy(self.labels[used[kept]])}
            return batch if kept.all() else {**batch, "kept": torch.from_numpy(kept)}

    def finish(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**batch, "image": self.transform.finish(batch["image"])}

    def take_faults(self) -> list[Fault]:
        """What could not be used since the last call."""
        found, self._faults = self._faults, []
        return found

    def ahead(self, blocks: Sequence[int]) -> None:
        """Shards that are wanted soon."""
        self._files.ahead(blocks)

    def _usable(self, index: int) -> tuple[Photo | None, int]:
        """The photo at ``index``, or what takes its place, and where that is from."""
        try:
            return self._photo(index), index
        except (ValueError, Damaged, Unreachable) as error:
            self._note(index, error)
        return self._stand_in(index)

    def _stand_in(self, index: int) -> tuple[Photo | None, int]:
        if not self.train:
            return None, index
        for step in range(1, min(_STAND_INS + 1, len(self))):
            other = (index + step) % len(self)
            try:
                photo = self._photo(other)
                photo.whole()
            except (ValueError, Damaged, Unreachable) as error:
                self._note(other, error)
            else:
                return photo, other
        raise UserError(f"{self._name(index)}: cannot be used, and nor can the {_STAND_INS} samples after it")

    def _photo(self, index: int) -> Photo:
        content = self._files.read(self._block(index), int(self._offsets[index]), int(self._sizes[index]))
        return Photo(content, self.channels)

    def _note(self, index: int, error: Exception) -> None:
        """Remember a fault; raise it as a UserError where one is to stop the run."""
        if isinstance(error, UserError):
            # what is neither is no fault of the data: a full disk would have every sample left out
            if not self.skip or not isinstance(error, Damaged | Unreachable):
                raise error
            path = self.paths[self._block(index)]
            self._faults.append(Fault(index, self._name(index), str(error).removeprefix(f"{path}: ")))
            return
        if not self.skip:
            raise UserError(
                f"{self._name(index)}: the image cannot be decoded ({error}); replace it in the source and prepare the "
                "dataset again (mmtrain data prepare images --force), or leave such samples out: data.faults=skip"
            ) from error
        self._faults.append(Fault(index, self._name(index), f"the image cannot be decoded ({error})"))

    def _block(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _name(self, index: int) -> str:
        block = self._block(index)
        within = index - (int(self._ends[block - 1]) if block else 0)
        try:
            shard = index_shards([self.paths[block]], skip=self.skip, cache=self.cache)[0]
            key = f"sample {str(shard.keys[within])!r}"
        except (UserError, IndexError):  # the shard was damaged since: the number must do
            logging.getLogger("mmtrain").debug("no keys for %s", self.paths[block])
            key = f"sample number {within}"
        return f"{self.paths[block]}, {key}"


def _missing(shards: Sequence[ShardIndex]) -> list[Fault]:
    """The damaged shards; how many samples each lacks is judged by those that are whole."""
    whole = [len(shard) for shard in shards if not shard.fault]
    usual = round(sum(whole) / len(whole)) if whole else 1
    return [Fault(-1, str(shard.path), shard.fault, max(1, usual - len(shard))) for shard in shards if shard.fault]


def _meta_of(shard: Path | str) -> Path | str:
    """The ``meta.json`` of the dataset of which ``shard`` is one file."""
    return shard.rsplit("/", 2)[0] + "/meta.json" if isinstance(shard, str) else shard.parent.parent / "meta.json"


def read_classes(meta: Path | str) -> list[str] | None:
    """The names of the classes in a ``meta.json``; None if it is not there. Raises UserError if it is damaged."""
    try:
        text = _text(meta)
        return None if text is None else [str(name) for name in json.loads(text)["classes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{meta}: not readable as JSON with a list "classes" ({error}); prepare the dataset again'
        ) from error


def _text(file: Path | str) -> str | None:
    if isinstance(file, Path):
        return file.read_text(encoding="utf-8") if file.is_file() else None
    try:
        return str(file_system(file).cat_file(file).decode("utf-8"))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except Exception as error:  # each kind of storage has its own
        raise Unreachable(f"{file}: cannot be read ({said(error)})") from error
