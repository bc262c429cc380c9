"""The workbench of a torture: one folder, its shards, and how runs are started in it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldistill.tools.torture.history import History
from ldistill.tools.torture.processes import Ranks
from ldistill.tools.torture.rank import FIRED, Fault
from ldistill.tools.torture.world import ORDINARY, Mixture, write_engine, write_recipe, write_world


@dataclass
class Row:
    """One line of the table: what was done to a run, and whether it held."""

    fault: str
    expected: str
    outcome: str
    passed: bool
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Bench:
    """Where runs are tortured.

    Attributes:
        root: a folder of its own; shards, run folders and logs go there.
        ranks: gloo ranks of a run.
        steps: optimizer steps of a run.
        stage: ZeRO stage.
    """

    root: Path
    ranks: int = 2
    steps: int = 12
    stage: int = 2
    timeout: float = 600

    def shards(self, name: str = "shards", mixture: Mixture = ORDINARY) -> Path:
        """Shards of a mixture, written once."""
        folder = self.root / name
        return folder if folder.exists() else write_world(folder, mixture)

    def start(
        self,
        run: Path,
        *flags: str,
        shards: Path | None = None,
        ranks: int | None = None,
        stage: int | None = None,
        fault: Fault | None = None,
        **fields: object,
    ) -> Ranks:
        """Start a run, or go on with it: `--resume_from_checkpoint auto`."""
        ranks, stage = ranks or self.ranks, self.stage if stage is None else stage
        shards = shards or self.shards()
        recipe = write_recipe(
            self.root / f"{run.name}.yaml", shards, max_steps=self.steps, **fields
        )
        config = write_engine(self.root / f"zero{stage}.json", stage)
        argv = ["--recipe", str(recipe), "--output_dir", str(run), "--deepspeed", str(config)]
        argv += ["--resume_from_checkpoint", "auto", *flags]
        return Ranks(argv, ranks=ranks, logs=self.root / "logs" / run.name, fault=fault)

    def complete(self, run: Path, *flags: str, **options: Any) -> History:
        """Run to the end.

        Raises:
            RuntimeError: it failed (the end of what it said is in the message), or its fault never
                happened.
        """
        with self.start(run, *flags, **options) as ranks:
            code = ranks.finish(self.timeout)
            said = ranks.output()
            if code != 0:
                raise RuntimeError(f"{run.name} ended with {code}:\n{said[-3000:]}")
            if options.get("fault") is not None and FIRED not in said:
                raise RuntimeError(f"{run.name}: its fault never happened")
        return History.of(run)

    def undisturbed(self, name: str = "undisturbed", **options: Any) -> History:
        """The run that nothing happens to; run once under its name.

        Raises:
            ChildProcessError: it fails, so that nothing can be tried on this machine.
        """
        run = self.root / name
        if (run / "student").exists():
            return History.of(run)
        try:
            return self.complete(run, **options)
        except RuntimeError as error:
            raise ChildProcessError(f"no run ends well here, even undisturbed: {error}") from error

    def fresh(self, name: str) -> Path:
        """A run folder that holds nothing."""
        run = self.root / name
        shutil.rmtree(run, ignore_errors=True)
        return run
