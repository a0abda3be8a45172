"""Which files of a directory make up one checkpoint."""

import json
from pathlib import Path

from ..weights import CheckpointError


def checkpoint_files(directory: Path, name: str, others: str) -> tuple[list[Path], dict[str, Path]]:
    """The files, and where the index says that each tensor is, if there is one.

    name: of a checkpoint in one file, such as ``model.safetensors``; an index has ``.index.json`` behind it. Without
    either, the files that match `others`. Raises CheckpointError where the index is none, or names files that are not
    there.
    """
    index_file = directory / f"{name}.index.json"
    if index_file.exists():
        try:
            weight_map = json.loads(index_file.read_text())["weight_map"]
            index = {tensor: directory / file for tensor, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index_file}: not an index of weights: {error!r}") from error
        files = sorted(set(index.values()))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(f"{directory}: missing {', '.join(missing)}, named in {index_file.name}")
        return files, index
    whole = directory / name
    return [whole] if whole.exists() else sorted(directory.glob(others)), {}


def check_index(directory: Path, name: str, index: dict[str, Path], holders: dict[str, str]) -> None:
    """holders: the file that each tensor was found in. Raises CheckpointError where an index says something else."""
    for tensor, file in index.items():
        found = holders.get(tensor)
        if found != str(file):
            where = "in no file that it names" if found is None else f"in {found}"
            raise CheckpointError(
                f"{directory / name}.index.json: tensor {tensor} is said to be in {file}, but is {where}"
            )
