"""shap, captum, shapiq and lime on the games, with the calls that their documentation shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapley_case import Contender, Question

Prepare = Callable[[Question], Contender]


def _budget(question: Question) -> int:
    return question.case.coalitions * question.case.backgrounds


def _rows(question: Question, one: Callable[[np.ndarray, int], np.ndarray]) -> Contender:
    """A peer that explains one row at a time."""

    def run(seed: int) -> Tensor:
        rows = [one(row, seed) for row in question.x.numpy()]
        return torch.from_numpy(np.stack(rows).astype(np.float64))

    return Contender(run, _budget(question))


def shap_permutation(question: Question) -> Contender:
    import shap

    background = question.background.numpy()
    masker = shap.maskers.Independent(background, max_samples=len(background))

    def run(seed: int) -> Tensor:
        explainer = shap.PermutationExplainer(question.numpy, masker, seed=seed)
        found = explainer(question.x.numpy(), max_evals=question.case.coalitions, silent=True)
        return torch.from_numpy(np.asarray(found.values, dtype=np.float64))

    return Contender(run, _budget(question))


def shap_kernel(question: Question) -> Contender:
    """Without its default l1_reg, which leaves an error of half the values."""
    import shap

    background = question.background.numpy()

    def run(seed: int) -> Tensor:
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        explainer = shap.KernelExplainer(question.numpy, background)
        found = explainer.shap_values(
            question.x.numpy(), nsamples=question.case.coalitions, l1_reg=False, silent=True
        )
        np.random.set_state(state)  # noqa: NPY002
        return torch.from_numpy(np.asarray(found, dtype=np.float64))

    return Contender(run, _budget(question))


def shap_sampling(question: Question) -> Contender:
    import shap

    def run(seed: int) -> Tensor:
        np.random.seed(seed)  # noqa: NPY002
        explainer = shap.SamplingExplainer(question.numpy, question.background.numpy())
        found = explainer.shap_values(question.x.numpy(), nsamples=_budget(question) // 2)
        return torch.from_numpy(np.asarray(found, dtype=np.float64))

    return Contender(run, _budget(question))


def captum_sampling(per_call: int) -> Prepare:
    def prepare(question: Question) -> Contender:
        from captum.attr import ShapleyValueSampling

        method = ShapleyValueSampling(question.torch)
        background = question.background
        m = question.case.columns

        def one(row: np.ndarray, seed: int) -> np.ndarray:
            torch.manual_seed(seed)
            found = method.attribute(
                torch.from_numpy(row).expand(len(background), m).contiguous(),
                baselines=background,
                n_samples=question.case.coalitions // m,
                perturbations_per_eval=per_call,
            )
            return found.mean(0).numpy()

        return _rows(question, one)

    return prepare


def captum_kernel(question: Question) -> Contender:
    from captum.attr import KernelShap

    background, m = question.background, question.case.columns

    def one(row: np.ndarray, seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        x = torch.from_numpy(row)

        def value(inside: Tensor) -> Tensor:
            rows = torch.where(inside[:, None].bool(), x, background)
            return question.torch(rows.flatten(0, 1)).reshape(len(inside), -1).mean(1)

        found = KernelShap(value).attribute(
            torch.ones(1, m),
            baselines=torch.zeros(1, m),
            n_samples=question.case.coalitions,
            perturbations_per_eval=100,
        )
        return found[0].numpy()

    return _rows(question, one)


def shapiq_peer(name: str) -> Prepare:
    def prepare(question: Question) -> Contender:
        import shapiq

        background, m = question.background.numpy(), question.case.columns

        def one(row: np.ndarray, seed: int) -> np.ndarray:
            game = shapiq.imputer.MarginalImputer(
                model=question.numpy, data=background, x=row[None], sample_size=len(background),
                random_state=seed,
            )  # fmt: skip
            method = {
                "permutation": lambda: shapiq.PermutationSamplingSV(n=m, random_state=seed),
                "kernel": lambda: shapiq.KernelSHAP(n=m, random_state=seed, pairing_trick=True),
            }[name]()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = method.approximate(budget=question.case.coalitions, game=game)
            return np.array([found[(j,)] for j in range(m)])

        return _rows(question, one)

    return prepare


def lime_tabular(question: Question) -> Contender:
    from lime.lime_tabular import LimeTabularExplainer

    return lime_call(LimeTabularExplainer, question)


def lime_call(kind: Callable[..., Any], question: Question) -> Contender:
    """lime's call, of its own explainer or of another with the same arguments."""
    explainer = kind(
        question.train.numpy(), mode="regression", discretize_continuous=True, random_state=0
    )

    def run(seed: int) -> None:
        for row in question.x.numpy():
            explainer.explain_instance(
                row, question.numpy, num_features=question.case.columns,
                num_samples=question.case.coalitions,
            )  # fmt: skip

    return Contender(run, question.case.coalitions)


SHAPLEY: dict[str, Prepare] = {
    "shap Permutation": shap_permutation,
    "shap Kernel, l1_reg=False": shap_kernel,
    "shap Sampling": shap_sampling,
    "captum SVS, 30 a call": captum_sampling(30),
    "captum SVS, 1 a call": captum_sampling(1),
    "captum KernelShap, 100 a call": captum_kernel,
    "shapiq Permutation": shapiq_peer("permutation"),
    "shapiq KernelSHAP, pairs": shapiq_peer("kernel"),
}
MANY = {"shap Permutation": shap_permutation}
LIME = {"lime": lime_tabular}
MEMORY = {"shap Permutation": shap_permutation}
