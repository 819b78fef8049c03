"""microtome.shapley and microtome.lime on the games."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.peers.bench_shapley_peers import lime_call
from benchmarks.shapley_case import Contender, Question

Prepare = Callable[[Question], Contender]


def _permutation(rows: float, *, white: bool, **options: Any) -> Prepare:
    """Permutations at a fraction of the case's budget, through the kernel or through a function."""

    def prepare(question: Question) -> Contender:
        from microtome import shapley

        case = question.case
        walks = max(2, 2 * round(rows * (case.coalitions / (2 * case.columns))))
        about: dict[str, Any] = {}
        f = question.net if white else question.torch

        def run(seed: int) -> Tensor:
            found = shapley.permutation(
                f, question.x, question.background, n_permutations=walks, seed=seed, **options
            )
            each = found.evaluations / len(question.x)
            about.update(engine=found.engine, note=found.note, evaluations=each)
            return found.values.reshape(len(question.x), -1)

        return Contender(run, walks * (case.columns - 1) * case.backgrounds, lambda: about)

    return prepare


def _kernel(**options: Any) -> Prepare:
    def prepare(question: Question) -> Contender:
        from microtome import shapley

        case = question.case

        def run(seed: int) -> Tensor:
            return shapley.kernel(
                question.torch, question.x, question.background, seed=seed,
                n_coalitions=case.coalitions, **options,
            ).values  # fmt: skip

        return Contender(run, case.coalitions * case.backgrounds)

    return prepare


def _lime(question: Question) -> Contender:
    from microtome.integrations.lime import LimeTabularExplainer

    return lime_call(LimeTabularExplainer, question)


def _lime_own(question: Question) -> Contender:
    from microtome import lime

    def run(seed: int) -> None:
        lime.explain_tabular(
            question.net, question.x, question.train, num_features=question.case.columns,
            num_samples=question.case.coalitions, seed=seed,
        )  # fmt: skip

    return Contender(run, question.case.coalitions)


def _drop_in(question: Question) -> Contender:
    from microtome.integrations.shap import PermutationExplainer

    def run(seed: int) -> Tensor:
        import torch

        explainer = PermutationExplainer(question.numpy, question.background.numpy(), seed=seed)
        found = explainer(question.x.numpy(), max_evals=question.case.coalitions, silent=True)
        return torch.as_tensor(found.values)

    return Contender(run, question.case.coalitions * question.case.backgrounds)


WHITE = {
    "white box, all rows": _permutation(1.0, white=True),
    "white box, all rows, fp32": _permutation(1.0, white=True, precision="fp32"),
    "white box, a fifth of the rows": _permutation(0.2, white=True),
    "white box, a tenth of the rows": _permutation(0.1, white=True),
    "white box, shared permutations": _permutation(1.0, white=True, shared=True),
}
CALLS = {
    "any callable, all rows": _permutation(1.0, white=False),
    "any callable, a fifth of the rows": _permutation(0.2, white=False),
    "kernel, any callable": _kernel(),
    "kernel, shared coalitions, any callable": _kernel(shared=True),
    "shap drop-in": _drop_in,
}


def _captum(question: Question) -> Contender:
    from microtome.integrations.captum import ShapleyValueSampling

    method = ShapleyValueSampling(question.torch)
    samples = question.case.coalitions // question.case.columns

    def run(seed: int) -> Tensor:
        return method.attribute(question.x, baselines=question.background, n_samples=samples)

    return Contender(run, question.case.coalitions)


ONE = {
    "any callable, antithetic": _permutation(1.0, white=False),
    "any callable, orthogonal": _permutation(1.0, white=False, design="orthogonal"),
    "white box": _permutation(1.0, white=True),
    "kernel, any callable": _kernel(),
    "shap drop-in": _drop_in,
    "captum drop-in, SVS": _captum,
}
SHAPLEY = {**WHITE, **CALLS}
MANY = {name: WHITE[name] for name in ("white box, all rows", "white box, a fifth of the rows")}
LIME = {"lime drop-in": _lime, "explain_tabular": _lime_own}
MEMORY = {
    "white box": _permutation(1.0, white=True),
    "any callable": _permutation(1.0, white=False),
}
