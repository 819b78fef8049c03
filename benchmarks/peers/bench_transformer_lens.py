"""TransformerLens: its bridge in compatibility mode and the functions of its `patching` module."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from benchmarks.patching_case import Contender, Question, load_model, metric


def act_patch(question: Question) -> Contender:
    """get_act_patch_resid_pre or get_act_patch_attn_head_out_all_pos.

    A part of the residual grid goes through generic_activation_patch, which the former calls, with
    a table of the wanted cells.
    """
    import pandas as pd
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    # Compatibility mode folds weights in place, so the bridge gets a model of its own.
    model = TransformerBridge.boot_transformers(
        str(question.folder), hf_model=load_model(question.folder)
    )
    model.enable_compatibility_mode()
    model.eval()
    layers = question.sweep.shape.layers

    def swept(columns: list[int] | None) -> Tensor:
        cells_of_a_layer = len(columns or question.columns)
        seen = itertools.count(1)

        def measured(logits: Tensor) -> Tensor:
            score = metric(logits)
            if next(seen) % cells_of_a_layer == 0:
                question.between()
            return score

        _, cache = model.run_with_cache(question.clean)
        arguments: tuple[Any, ...] = (model, question.corrupted, cache, measured)
        if question.sweep.site == "z":
            if columns is None:
                return patching.get_act_patch_attn_head_out_all_pos(*arguments)
            setter, name, axis = patching.layer_head_vector_patch_setter, "z", "head_index"
        else:
            if columns is None:
                return patching.get_act_patch_resid_pre(*arguments)
            setter, name, axis = patching.layer_pos_patch_setter, "resid_pre", "pos"
        cells = [(layer, column) for layer in range(layers) for column in columns]
        table = pd.DataFrame(cells, columns=["layer", axis])
        flat = patching.generic_activation_patch(*arguments, setter, name, index_df=table)
        return flat.view(layers, len(columns))

    whole = len(question.columns) == question.sweep.columns
    return Contender(
        lambda: swept(None if whole else question.columns), lambda: swept(question.columns[:1])
    )


VARIANTS = {"get_act_patch": act_patch}
