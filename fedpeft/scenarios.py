"""Scenario files: the user's own by path, the shipped ones by name."""

from importlib import resources
from pathlib import Path

from fedpeft.errors import ConfigError


def shipped() -> dict[str, Path]:
    """Returns the shipped scenarios: name -> file."""
    folder = Path(str(resources.files("simulations")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_scenario(scenario: str) -> Path:
    """Returns the file that a path or a name means.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(scenario)
    if path.suffix == ".toml" or path.is_file():
        return path
    known = shipped()
    if scenario not in known:
        raise ConfigError(
            f"Expected a scenario file or one of {', '.join(known)}, got {scenario!r}."
        )
    return known[scenario]
