"""The five presets of the published method hold to its published commands, flag by flag."""

from pathlib import Path
from typing import Any

import pytest

from dpsink.config import flatten, load_config

PRESETS = Path(__file__).parents[1] / "experiments" / "presets"

# The flags of the published README, for each command; those that say how to run or what to draw are left out.
DIGITS = (
    "--target_epsilon 10.0 --debias --debias_ratio 0.2 --cost l1+l2 --p 1 --num_epochs 400 --batch_size 50 --lr 1e-5 "
    "--sinkhorn_eps 0.05 --g_type conv_cond --act_function lllt --latent_dim 16 --hidden_dim 64 --embed_dim 8 "
    "--embed_multiplier 15 --sampling poisson --mechanism img_grad --d_steps 0 --dp --l2_norm_clip 0.5 "
    "--sensitivity_to_l2_norm_clip 2"
)
COMMANDS = {
    "mnist_batch_m1": f"--dataset mnist --mixture_fraction 1.0 --noise_multiplier 1.1 {DIGITS}",
    "mnist_batch_m3": f"--dataset mnist --mixture_fraction 3.0 --noise_multiplier 1.1 {DIGITS}",
    "fashion_batch_m1": f"--dataset fashion_mnist --mixture_fraction 1.0 --noise_multiplier 0.9 {DIGITS}",
    "fashion_batch_m3": f"--dataset fashion_mnist --mixture_fraction 3.0 --noise_multiplier 0.9 {DIGITS}",
    "celeba_batch": (
        "--dataset celeb_32_2 --num_epochs 260 --target_epsilon 10.0 --batch_size 200 --lr 1e-5 --sinkhorn_eps 5 "
        "--cost l2 --p 2 --g_type cond_biggan --act_function lllt --latent_dim 32 --hidden_dim 64 --embed_dim 4 "
        "--embed_multiplier 15 --sampling poisson --mechanism img_grad --noise_multiplier 0.8 --l2_norm_clip 0.1 "
        "--sensitivity_to_l2_norm_clip 2 --dp"
    ),
}
SETTINGS = {
    "--dataset": "data.name",
    "--target_epsilon": "privacy.target_epsilon",
    "--noise_multiplier": "privacy.noise_multiplier",
    "--l2_norm_clip": "privacy.clip_norm",
    "--batch_size": "privacy.batch_size",
    "--cost": "sinkhorn.cost",
    "--p": "sinkhorn.p",
    "--mixture_fraction": "sinkhorn.l1_weight",
    "--sinkhorn_eps": "sinkhorn.blur",
    "--debias_ratio": "sinkhorn.debias_ratio",
    "--embed_multiplier": "sinkhorn.label_weight",
    "--g_type": "generator.kind",
    "--latent_dim": "generator.latent_dim",
    "--hidden_dim": "generator.hidden_dim",
    "--embed_dim": "generator.embed_dim",
    "--lr": "optimizer.lr",
}
FIXED = {  # flags that the published method always sets so, and what stands for them here
    "--act_function": "lllt",
    "--sampling": "poisson",
    "--mechanism": "img_grad",
    "--sensitivity_to_l2_norm_clip": "2",
    "--d_steps": "0",
    "--debias": "",
    "--dp": "",
}
RECORDS = {"mnist": 60_000, "fashion_mnist": 60_000, "celeba": 162_770}
presets = pytest.mark.parametrize("name", COMMANDS)


def flags(name: str) -> dict[str, str]:
    """Flag to value, empty for a switch."""
    found, last = {}, ""
    for word in COMMANDS[name].split():
        last = word if word.startswith("--") else last
        found[last] = "" if word == last else word
    return found


def settings(name: str) -> dict[str, Any]:
    return flatten(load_config(PRESETS / f"{name}.yaml"))


@presets
def test_preset_has_the_values_of_the_published_flags(name: str) -> None:
    ours, published = settings(name), flags(name)
    for flag, path in SETTINGS.items():
        value = published.get(flag)
        if value is None:
            continue
        value = {"celeb_32_2": "celeba"}.get(value, value)
        assert ours[path] == (value if isinstance(ours[path], str) else float(value)), flag


@presets
def test_no_published_flag_is_left_out(name: str) -> None:
    rest = {flag: value for flag, value in flags(name).items() if flag not in SETTINGS}
    assert rest.pop("--num_epochs") in {"400", "260"}  # to the budget instead: the line step_limit
    assert rest.items() <= FIXED.items()


@presets
def test_preset_is_the_published_method_to_the_end_of_its_budget(name: str) -> None:
    """The whole batch is clipped, n is its size, labels are uniform, nothing is held out, the rate is constant."""
    ours = settings(name)
    assert (ours["privacy.mechanism"], ours["sinkhorn.labels"]) == ("batch", "uniform")
    assert ours["sinkhorn.gen_batch_size"] == ours["privacy.batch_size"]
    assert (ours["data.validation_size"], ours["privacy.steps"], ours["privacy.step_limit"]) == (0, None, None)
    assert (ours["optimizer.schedule"], ours["generator.conditional"]) == ("constant", True)


@presets
def test_commented_step_limit_is_the_published_number_of_epochs(name: str) -> None:
    """An epoch is N / batch_size steps; the last one may be cut."""
    published, text = flags(name), (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    limit = int(text.partition("# step_limit: ")[2].split()[0])
    batches = RECORDS[settings(name)["data.name"]] / int(published["--batch_size"])
    assert limit in {int(published["--num_epochs"]) * whole for whole in (int(batches), int(batches + 0.999))}


def test_debiasing_and_delta_of_celeba_differ_from_its_command_as_documented() -> None:
    """geomloss debias=True is ratio 0 up to its scale; δ = 1e-5 would be above 1/N, so it is the paper's 1e-6."""
    ours = settings("celeba_batch")
    assert (ours["sinkhorn.debias_ratio"], ours["privacy.delta"], ours["data.attribute"]) == (0, 1e-6, "Male")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "celeba_batch"])
def test_delta_of_the_digits_presets_is_the_published_one(name: str) -> None:
    assert settings(name)["privacy.delta"] == 1e-5


@presets
def test_table_of_a_preset_says_what_it_sets(name: str) -> None:
    """σ, C, blur, and the sizes of the generator, as its comment shows them."""
    ours, text = settings(name), (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line for line in text.splitlines() if line.startswith("#"))
    shown = [
        f"| σ, C | {ours['privacy.noise_multiplier']:g}, {ours['privacy.clip_norm']:g} |",
        f"| blur | {ours['sinkhorn.blur']:g} |",
        f"| cost, p | {ours['sinkhorn.cost']}, {ours['sinkhorn.p']} |",
        f"| batch, n | {ours['privacy.batch_size']} |",
        "| latent / hidden / embed | "
        + " / ".join(str(ours[f"generator.{k}_dim"]) for k in ("latent", "hidden", "embed")),
    ]
    assert [part for part in shown if part not in comment] == []
