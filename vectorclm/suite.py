"""What a model is measured by: a file of benchmarks, or the evaluation of an experiment."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from vectorclm.config import EXPERIMENTS, ExperimentConfig, read_config
from vectorclm.errors import ConfigError
from vectorclm.evaluate import Questions
from vectorclm.settings import validate
from vectorclm.world import WorldConfig

SUITES = EXPERIMENTS / "suites"


class Suite(Questions):
    """Benchmarks, and what else a model is asked."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    seed: int = Field(1, ge=0, lt=2**32, description="By which items are drawn")
    experiment: ExperimentConfig | None = Field(
        None, description="Whose evaluation it is: its held-out text and conversations are scored, too"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not self.tasks and self.experiment is None:
            raise ValueError("a suite needs [[tasks]]")
        if self.world is None and (lost := [task.label for task in self.tasks if task.is_generated]):
            raise ValueError(f"{', '.join(lost)} read the generated world, which only an experiment has")
        return self

    @property
    def world(self) -> WorldConfig | None:
        """The generated world that sources read."""
        return self.experiment.world if self.experiment is not None else None

    @classmethod
    def of(cls, experiment: ExperimentConfig) -> Self:
        """The evaluation of an experiment."""
        return cls(name=experiment.name, seed=experiment.seed, experiment=experiment, **dict(experiment.evaluate))


def load_suite(name_or_path: str) -> tuple[Suite, Path]:
    """The suite of that name, or the evaluation of the experiment of that name, or those of a file; and its path.

    Raises ConfigError that names the file, every bad key and what would be right.
    """
    path = Path(name_or_path)
    if not path.suffix:
        places = (SUITES / f"{name_or_path}.toml", EXPERIMENTS / f"{name_or_path}.toml")
        path = next((place for place in places if place.is_file()), path)
    if not path.is_file():
        suites, experiments = (
            ", ".join(sorted(file.stem for file in folder.glob("*.toml"))) for folder in (SUITES, EXPERIMENTS)
        )
        raise ConfigError(
            f"no suite {name_or_path!r}: use {suites}, an experiment ({experiments}), or the path of a TOML file"
        )
    values = read_config(path)
    if "sample" in values:
        return Suite.of(validate(ExperimentConfig, values, str(path))), path
    return validate(Suite, values, str(path)), path
