"""Where a path of a configuration leads: to a file or folder, also within an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from drivetrain import DataError

SCHEME = "package:"
_PATH_HELP = "a file, a folder, or package:NAME/FILE for one inside an installed package"


def locate(path: str) -> Path:
    """The file or folder that `path` means, whether it exists or not.

    "package:NAME/REST" is REST within the installed package NAME, which is found without being imported; "package:NAME" is the
    package's folder, or the file of a module that is a single file.

    Raises:
        DataError: when no such package is installed.
    """
    if not path.startswith(SCHEME):
        return Path(path).expanduser()
    name, _, rest = path.removeprefix(SCHEME).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not (spec.submodule_search_locations or spec.has_location):
        raise DataError(f"{path}: no package {name!r} is installed here; write package:NAME/FILE, after pip install of NAME.")
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))) / rest
    if rest:
        raise DataError(f"{path}: {name!r} is a single module and has no file {rest!r} in it; write package:{name}.")
    return Path(str(spec.origin))
