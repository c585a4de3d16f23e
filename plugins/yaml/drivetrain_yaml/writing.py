"""From plain data to YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from drivetrain_yaml import schema


class _Dumper(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 (PyYAML's rules) or 1.2 (ours) would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that stands in two places twice."""
        return True


for _tag, _pattern in (("int", schema.DECIMAL), ("int", schema.OCTAL), ("int", schema.HEXADECIMAL), ("float", schema.FLOAT)):
    # PyYAML asks with `match`, which is content with a beginning
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), list("-+.0123456789"))


def write(table: Mapping[str, Any]) -> str:
    """A table as YAML in block style; see `Yaml.dumps`."""
    return yaml.dump(dict(table), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)
