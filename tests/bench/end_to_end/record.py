"""The results file: written after every measurement, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fiddler_runtime.errors import FiddlerError
from fiddler_runtime.whole_file import write_whole

from .configurations import Configuration

FORMAT = 1


@dataclass
class Record:
    """What was measured.

    setup      what must be the same for results to stand beside one another
    about      the machine, the plan and the like, for readers
    runs       strategy -> generation -> rounds, each {"seconds": when every token was there, since the prompt went in,
               "tokens": those before the last of these, of one sequence, "expert_calls"}
    checks     strategy -> a few logits of a fixed prompt
    predicted  strategy -> configuration -> seconds
    """

    path: Path
    setup: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    checks: dict[str, list[float]] = field(default_factory=dict)
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, setup: dict[str, Any]) -> Record:
        """A new one, or the one at `path`. Raises FiddlerError if that was measured with another setup."""
        if not path.exists():
            return Record(path, setup)
        record = Record.read(path)
        differ = [key for key in setup if record.setup.get(key) != setup[key]]
        if differ:
            raise FiddlerError(
                f"the results in {path} were measured with other options",
                found=", ".join(f"{key} {record.setup.get(key)}" for key in differ),
                expected=", ".join(f"{key} {setup[key]}" for key in differ),
                hint="--output OTHER_FOLDER, or the same options as before",
            )
        return record

    @staticmethod
    def read(path: Path) -> Record:
        """As it was written. Raises FiddlerError if it was not."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.pop("format") != FORMAT:
                raise KeyError("format")
            return Record(path, **value)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FiddlerError(
                f"cannot read the results {path}",
                found=str(error) or repr(error),
                expected="what this command wrote",
                hint="--output OTHER_FOLDER",
            ) from None

    def write(self) -> None:
        """Replaces the file at once."""
        value = {key: getattr(self, key) for key in ("setup", "about", "runs", "checks", "predicted")}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, (json.dumps({"format": FORMAT, **value}, indent=1) + "\n").encode())
        except OSError as error:
            raise FiddlerError(f"cannot write {self.path}", found=error.strerror, hint="--output FOLDER") from None

    def rounds(self, strategy: str, wanted: Configuration) -> list[list[float]]:
        """Of every round that got so far, when each of the configuration's tokens was there."""
        found = self.runs.get(strategy, {}).get(wanted.generation, [])
        return [one["seconds"][: wanted.new] for one in found if len(one["seconds"]) >= wanted.new]

    def seconds(self, strategy: str, wanted: Configuration) -> float | None:
        """The whole configuration's time, the median over rounds; None if it was not measured."""
        found = self.rounds(strategy, wanted)
        return statistics.median(seconds[-1] for seconds in found) if found else None

    def partial(self, strategy: str, wanted: Configuration) -> dict[str, Any]:
        """A round of the configuration that was cut off and can go on, the longest; else a new one, empty."""
        found = self.runs.get(strategy, {}).get(wanted.generation, [])
        open_ = [one for one in found if 1 < len(one["seconds"]) < wanted.new and wanted.beams == 1]
        return max(
            open_, key=lambda one: len(one["seconds"]), default={"seconds": [], "tokens": [], "expert_calls": {}}
        )

    def note(self, strategy: str, wanted: Configuration, one: dict[str, Any]) -> None:
        """Keeps a round, also an unfinished one, and drops those that had not got so far."""
        rounds = self.runs.setdefault(strategy, {}).setdefault(wanted.generation, [])
        rounds[:] = [other for other in rounds if other is not one and len(other["seconds"]) >= len(one["seconds"])]
        rounds.append(one)
