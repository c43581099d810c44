"""Weights that a model needs and its checkpoint lacks: an error that names them.

The loader of transformers fills them with random numbers and says so in a table that is easily
missed. Tied weights, buffers that are computed, and what a model says it can do without are not
lacking.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from specmoe_compile.errors import CheckpointError

logger = logging.getLogger(__name__)

MissingWeights = Literal["error", "random"]
_MOST_NAMES = 6


def missing_before_loading(model: Any, made: Collection[str]) -> list[str]:
    """Return the weights of a model that nothing in its checkpoint makes, before any is read.

    What transformers reports after loading decides; this spares the time of packing first.

    Args:
        model: on the meta device.
        made: names of the weights that the checkpoint's tensors become.
    """
    if model.is_custom_code():  # it may share modules, which only loading shows
        return []
    missing = set(model.state_dict()).difference(made)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for source in set(tied.values()):
        group = {source, *(target for target, other in tied.items() if other == source)}
        if not group <= missing:
            missing -= group
    for pattern in model._keys_to_ignore_on_load_missing or ():
        missing = {name for name in missing if re.search(pattern, name) is None}
    return sorted(missing)


def report_missing(
    model: Any,
    checkpoint_name: str,
    missing: Collection[str],
    unexpected: Sequence[str],
    how: MissingWeights,
) -> None:
    """Say which weights a checkpoint lacks.

    Args:
        model: what is loaded.
        checkpoint_name: for people.
        missing: names of the weights that would be random.
        unexpected: tensors of the checkpoint that the model does not know.
        how: "error", or "random" for a warning.

    Raises:
        CheckpointError: something is missing, and `how` is "error".
    """
    if not missing:
        return
    names = sorted(missing)
    listed = ", ".join(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        listed += f", and {len(names) - _MOST_NAMES} more"
    if how == "random":
        logger.warning("%s lacks %s: they are drawn at random.", checkpoint_name, listed)
        return
    hints = ""
    saved_as = [a for a in getattr(model.config, "architectures", None) or () if a]
    if saved_as and type(model).__name__ not in saved_as:
        hints += f" It was saved as {saved_as[0]}."
    if unexpected:
        hints += (
            f" Tensors that the model does not know: {len(unexpected)}, such as "
            f"{sorted(unexpected)[0]}."
        )
    raise CheckpointError(
        f"{checkpoint_name} lacks weights of {type(model).__name__}, which would be random: "
        f"{listed}.{hints} Use a complete checkpoint, or give missing_weights='random' "
        "(--missing-weights random) if random ones are what you want."
    )
