"""The command line's request for a judgement, for arenas and suites alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meta_train.judging.contestants import Learned
from meta_train.judging.runner import Progress
from meta_train.provenance import WHERE, elsewhere, read_environment
from meta_train.workers import Each


@dataclass(frozen=True)
class Request:
    """One judgement.

    Args:
        kind: ``"task"`` or ``"suite"``.
        name: Name of the arena or suite.
        rules: Learned contestants; none is tuned.
        cache: Directory of finished runs.
        data: Directory of real data.
        baselines: Tables of an earlier judgement, from which the baselines' rows are taken.
        horizon: Leave out longer horizons.
        tasks: Names of the tasks to judge on; empty for all.
        each: Goes over the runs.
        progress: Shows the progress through a list of runs.
    """

    kind: str
    name: str
    rules: Sequence[Learned]
    cache: Path
    data: Path | None = None
    baselines: Path | None = None
    horizon: int | None = None
    tasks: Sequence[str] = ()
    each: Each = map
    progress: Progress = field(default=lambda runs, total: runs)

    def about(self, used: Iterable[Path]) -> dict[str, Any]:
        """Return for ``environment.json`` how to repeat the tables, and where kept runs were made if not here.

        Args:
            used: Files of the runs that the tables are made of.

        Returns:
            Plain values.
        """
        lrs = list(dict.fromkeys(rule.lr for rule in self.rules))
        words = [*dict.fromkeys(rule.names for rule in self.rules), f"--{self.kind} {self.name}"]
        words += [f"--tasks {' '.join(self.tasks)}"] if self.tasks else []
        words += [f"--horizon {self.horizon}"] if self.horizon else []
        words += [f"--lr {' '.join(f'{lr:g}' for lr in lrs)}"] if lrs != [1.0] else []
        about: dict[str, Any] = {"fingerprints": {rule.name: rule.fingerprint for rule in self.rules}}
        if self.baselines:
            earlier = read_environment(self.baselines / "environment.json", self.kind, *WHERE)
            words.append(f"--baselines {'DIR' if self.baselines.is_absolute() else self.baselines.as_posix()}")
            about["baselines"] = earlier.get("baselines") or {key: earlier[key] for key in WHERE}
        words += ["--data DIR"] if self.data else []
        about["command"] = f"python -m meta_train evaluate {' '.join(words)} --out runs/results"
        places = elsewhere(used)
        return {self.kind: self.name, **about, **({"made": places} if places else {})}

    def check_baselines(self) -> None:
        """Refuse baselines of another judgement.

        Raises:
            ValueError: If their tables are of another arena or suite.
        """
        if self.baselines:
            earlier = read_environment(self.baselines / "environment.json", self.kind, *WHERE)[self.kind]
            if earlier != self.name:
                raise ValueError(f"{self.baselines} is a judgement of {earlier!r}, not of {self.name!r}")
