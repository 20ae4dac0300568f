"""Read and write YAML with the scalar types of YAML 1.2 and with underscores in numbers.

`off`, `no` and dates are strings; `3e-4`, `1_000` and `.5` are numbers. By default, PyYAML follows YAML 1.1, in which `3e-4` is
a string. `Dumper` quotes every string that `Loader` would not read as a string.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_INT, _FLOAT = "tinylm:int", "tinylm:float"
_INT_PATTERN = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT_PATTERN = re.compile(r"^[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?$")


class Loader(yaml.SafeLoader):
    """Reads YAML recipes."""


class Dumper(yaml.SafeDumper):
    """Writes YAML that `Loader` reads back as equal values."""


Loader.yaml_implicit_resolvers = {}
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _notation in (Loader, Dumper):
    _notation.add_implicit_resolver(_INT, _INT_PATTERN, list("-+0123456789"))
    _notation.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+.0123456789"))
Loader.add_constructor(_INT, lambda loader, node: int(str(node.value).replace("_", "")))
Loader.add_constructor(_FLOAT, lambda loader, node: float(str(node.value).replace("_", "")))


def _represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    """Write text in double quotes if it contains a line separator other than \\n, because only double quotes preserve it."""
    style = '"' if any(separator in text for separator in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)


def yaml_value(value: Any) -> str:
    """Return one value of a recipe as YAML on one line, as in `--set KEY=VALUE`."""
    text: str = yaml.dump(value, Dumper=Dumper, allow_unicode=True, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").rstrip("\n")
