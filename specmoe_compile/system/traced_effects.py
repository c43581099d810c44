"""What Dynamo's code around a graph does to Python objects, known while a backend compiles it."""

from __future__ import annotations

import inspect
from typing import Any

from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import base, dicts

_ABSENT = object()


def leaves_objects_alone() -> bool:
    """Whether the trace that is compiled now changes no object that was there before.

    Such a change (a counter of a module, an entry of a list) is made by Python after the graph has
    run. The dictionary of a call's keyword arguments is the call's own, and what is written over
    itself (transformers notes that nobody records hidden states) is no change, nor is a dictionary
    that gets nothing new (transformers swaps the weights of split layers that are a `DTensor`, of
    which specmoe leaves none). False where nothing is traced, or where this version of PyTorch does
    not say.
    """
    try:
        trace = InstructionTranslator.current_tx()
        effects = trace.output.side_effects
        made = (base.AttributeMutationNew, base.ValueMutationNew)
        changed = [
            item
            for item in list(effects.id_to_variable.values())
            if not isinstance(item.mutation_type, made)
            and effects.is_modified(item)
            and not _is_own_keywords(item, trace.f_code)
            and not _is_written_over_itself(item, effects)
            and not _has_nothing_new(item)
        ]
        return not (changed or effects.tensor_hooks or effects.save_for_backward)
    except (AttributeError, AssertionError, LookupError, TypeError):
        return False


def _is_own_keywords(item: Any, code: Any) -> bool:
    """Whether an object is the `**kwargs` of the function that is traced."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    has_rest = bool(code.co_flags & inspect.CO_VARARGS)
    name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + has_rest]
    return bool(getattr(item.source, "local_name", None) == name)


def _has_nothing_new(item: Any) -> bool:
    """Whether a dictionary has what it had: Dynamo's code then leaves it alone."""
    return isinstance(item, dicts.ConstDictVariable) and not item.has_new_items()


def _is_written_over_itself(item: Any, effects: Any) -> bool:
    """Whether all that is written are constants that the object holds already."""
    written = effects.store_attr_mutations.get(item)
    if not written or not isinstance(item.mutation_type, base.AttributeMutationExisting):
        return False
    held = vars(item.value)
    return all(
        new.is_python_constant() and new.as_python_constant() is held.get(name, _ABSENT)
        for name, new in written.items()
    )
