"""Print the requirements of one extra of pyproject.toml, one a line, for the Makefile."""

import sys
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def flatten(requirements: list[str]) -> list[str]:
    """Replace microtome[extra] by that extra's own requirements."""
    out: list[str] = []
    for requirement in requirements:
        if requirement.startswith("microtome["):
            for extra in requirement.removeprefix("microtome[").removesuffix("]").split(","):
                out += flatten(PROJECT["optional-dependencies"][extra])
        else:
            out.append(requirement)
    return out


if __name__ == "__main__":
    print(
        "\n".join(
            dict.fromkeys(
                PROJECT["dependencies"] + flatten(PROJECT["optional-dependencies"][sys.argv[1]])
            )
        )
    )
