"""Where the files of a named reward are: a folder that the user gives, models/NAME in the working directory, or the hub's cache. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Needed:
    """Files of a network that a reward needs: the repository of the hub or the page that has them, and the commands that bring them.

    `name`: the folder in models/. `files`: names that must be in the folder, or patterns of which one file must be there. `cached`: whether the hub's cache
    holds them as they are needed; published pickles have to be converted first (`instep rewards convert`).
    """

    name: str
    source: str
    files: tuple[str, ...]
    fetch: str
    cached: bool = True

    @property
    def here(self) -> Path:
        """Where a folder of this name is looked for."""
        return Path("models") / self.name

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands, one by one."""
        return tuple(command.strip() for command in self.fetch.split("&&"))


def locate(needed: Needed, given: Path | None = None, setting: str = "folder") -> Path:
    """The folder of the files: `given`, else models/NAME, else the hub's cache. Raises ValueError, with the commands that bring the files.

    `setting`: the setting of the command line that gives the folder.
    """
    if given is not None:
        if missing := _missing(given, needed.files):
            what = f"lacks {missing}" if given.is_dir() else "is no folder"
            raise ValueError(f"{setting}: {given} {what}; it holds {', '.join(needed.files)} of {needed.source}, which come with: {needed.fetch}")
        return given
    if (found := available(needed)) is not None:
        return found
    where = f"{needed.here}{' or the hub cache' if needed.cached else ''}"
    raise ValueError(f"{needed.name}: {needed.source} is not in {where}; fetch it once with: {needed.fetch} (elsewhere: {setting}=FOLDER)")


def available(needed: Needed) -> Path | None:
    """Where the files are, without a folder of the user's: models/NAME or the hub's cache; None where they are not."""
    places = [needed.here] + ([found] if needed.cached and (found := _cached(needed)) is not None else [])
    return next((place for place in places if not _missing(place, needed.files)), None)


def _cached(needed: Needed) -> Path | None:
    """The folder of the repository in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(needed.source, next(name for name in needed.files if "*" not in name))
    return Path(found).parent if isinstance(found, str) else None


def _missing(folder: Path, files: Sequence[str]) -> str | None:
    """The first of the names or patterns that no file of a folder has."""
    return next((name for name in files if not any(folder.glob(name))), None)
