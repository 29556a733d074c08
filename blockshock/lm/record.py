"""What a run says of itself in `run.json`, beside its settings: what `tools` cannot work out.

plan        name, kind and syncs of a forward; null for a model that one rank holds
tokenizer   its digest
starts      one entry for each time the run was started: the step, the machine with its
            versions (`measure.environment.describe`), the commit of the checkout, and what else
            decides the losses: `init_from`, `skip_data`, and `changed`, the settings that are
            not those of the start before, with their old values
"""

import json
from pathlib import Path
from typing import Any

from blockshock.lm.config import Config
from blockshock.lm.prepare import Prepared
from blockshock.measure import environment
from blockshock.runs.files import written_whole
from blockshock.runs.ranks import Ranks
from blockshock.transformer.sync import plan

NAME = "run.json"


def write(
    config: Config, data: Prepared, ranks: Ranks, begun: int, choices: dict[str, Any]
) -> None:
    """Adds a start at step `begun`, and drops earlier ones from there on, whose rows go as well."""
    path, model = Path(config.run) / NAME, config.model
    starts = json.loads(path.read_bytes())["starts"] if begun and path.is_file() else []
    found = None
    if model.tensor_parallel > 1:
        chosen = plan(model.sync or "tp", model.depth)
        found = {"name": chosen.name, "kind": chosen.kind, "syncs": chosen.syncs}
    start = {
        "step": begun,
        "machine": environment.describe(kind=ranks.device.type, ranks=ranks.size),
        "commit_info": environment.commit(),
        **choices,
    }
    starts = [*(one for one in starts if one["step"] < begun), start]
    record = {"plan": found, "tokenizer": data.digest, "starts": starts}
    with written_whole(path) as out:
        out.write(json.dumps(record, indent=1).encode())
