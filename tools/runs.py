"""Training runs as a result file: what reading the folder of one takes, whatever was trained.

A run leaves `config.yaml`, all its settings, and `log.csv`. Runs that differ in more than the
settings of a study have another `recipe`, and no tool compares them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from tools.files import ToolError, read_text


def settings(folder: Path, sections: Iterable[str]) -> dict[str, Any]:
    """All settings of a run; ToolError where one of these sections is missing."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ToolError(f"{path} is not YAML: copy the run again") from error
    check_keys(path, config, dict.fromkeys(sections, dict))
    return config


def read_json(path: Path) -> Any:
    """What a run wrote there as JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ToolError(f"{path} is not JSON: copy the run again") from error


def check_keys(path: Path, found: object, kinds: Mapping[str, type]) -> None:
    """Raises ToolError for what no run wrote."""
    for key, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(key, ...), kind):
            raise ToolError(f"{path} has no {key} where a run writes it: copy the run again")


def recipe(
    config: dict, left_out: Iterable[str], left_out_of: Mapping[str, Iterable[str]], *more: str
) -> str:
    """A digest of all settings that must be alike where runs are compared.

    left_out: sections, and left_out_of: keys of a section, that may differ. more: what else counts.
    """
    kept = {
        section: {k: v for k, v in values.items() if k not in left_out_of.get(section, ())}
        for section, values in config.items()
        if section not in left_out
    }
    text = json.dumps([kept, *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def content(
    machine: dict, commits: list[dict | None], folders: Iterable[Path], benchmarks: list[dict]
) -> dict:
    """A result file; of the commits, where they are one. Its date is that of the newest log."""
    dated = max((folder / "log.csv").stat().st_mtime for folder in folders)
    return {
        "machine_info": {"blockshock": machine},
        "commit_info": commits[0] if all(commit == commits[0] for commit in commits) else None,
        "datetime": datetime.fromtimestamp(dated, timezone.utc).isoformat(),
        "benchmarks": benchmarks,
    }
