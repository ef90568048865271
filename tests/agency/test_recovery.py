"""Recovery: what it trains, on what, what it chooses, and that an interrupted training ends as one that was not."""

from __future__ import annotations

import math

import pytest
import torch
from builders import random_masks, tiny_gpt2, tiny_model

from pruning_comparison.agency import recovery
from pruning_comparison.agency.recovery import held_out_figures, recover, recovery_grid
from pruning_comparison.pruning.surgery import remove_heads

WINDOWS = torch.randint(1, 97, (6, 16), generator=torch.Generator().manual_seed(3))
HELD_OUT = torch.randint(1, 97, (3, 16), generator=torch.Generator().manual_seed(4))
MASK = random_masks(3, 4)["uneven"]


def recovered(dense, pruned, steps=12, seed=0, **settings):
    return recover(
        dense,
        pruned,
        WINDOWS,
        steps=steps,
        batch_size=2,
        generator=torch.Generator().manual_seed(seed),
        **{"learning_rate": 3e-3, **settings},
    )


def divergence(dense, other, windows=WINDOWS):
    """Mean Kullback-Leibler divergence per token, written out."""
    p, q = (model(windows).logits.log_softmax(-1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_comes_closer_to_the_dense_model_and_counts_what_it_saw():
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    student, cost = recovered(dense, pruned, steps=40)
    assert divergence(dense, student) < 0.7 * divergence(dense, pruned)
    assert cost.tokens == 40 * 2 * 16
    assert cost.seconds > 0
    assert (cost.learning_rate, cost.parameters, cost.trials) == (3e-3, "all", ())


def test_a_step_is_that_of_plain_autograd_and_adamw():
    """The loss written out with PyTorch's own functions, one step at the rate that the warm-up and the cosine give."""
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    student, _ = recovered(dense, pruned, steps=1, learning_rate=1e-2)
    other, trained = recovery.student_of(pruned, "all")
    ids = WINDOWS[torch.randperm(6, generator=torch.Generator().manual_seed(0))[:2]]
    with torch.enable_grad():
        p, q = (model(ids).logits.flatten(0, 1).log_softmax(-1) for model in (dense, other))
        torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True).backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    optimizer.step()
    assert len(trained) == 3 * 12
    for name, parameter in trained.items():
        # The first step of Adam goes by the signs of gradients, which rounding decides where they vanish.
        clear = parameter.grad.abs() > 1e-5
        assert clear.any()
        assert torch.allclose(student.get_parameter(name)[clear], parameter[clear], atol=1e-4), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_divergence_is_that_of_autograd(precision):
    draw = torch.Generator().manual_seed(1)
    dense, student = (3 * torch.randn(150, 40, generator=draw) for _ in range(2))
    with torch.enable_grad():
        mine, plain = (student.clone().requires_grad_() for _ in range(2))
        (recovery._divergence(mine.to(precision), dense.to(precision)) / 150).backward()
        p, q = dense.to(precision).double().log_softmax(-1), plain.to(precision).double().log_softmax(-1)
        torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True).backward()
    assert torch.allclose(mine.grad, plain.grad, atol=1e-7 if precision == torch.float32 else 1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_that_are_rounded_once_predict_as_those_that_autocast_rounds(family):
    dense = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    before = {name: one.clone() for name, one in dense.state_dict().items()}
    rounded = recovery._rounded(dense)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded(WINDOWS).logits, dense(WINDOWS).logits)
    assert rounded.get_input_embeddings().weight is dense.get_input_embeddings().weight
    assert {one.dtype for name, one in rounded.named_parameters() if "lm_head" in name} == {torch.bfloat16}
    assert all(
        torch.equal(one, before[name]) and one.dtype == torch.float32 for name, one in dense.state_dict().items()
    )


def test_a_batch_in_parts_trains_as_the_whole_one(monkeypatch):
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    whole, _ = recovered(dense, pruned, steps=3)
    monkeypatch.setattr(recovery, "_MOST_LOGITS", {"cpu": 1})
    parts, _ = recovered(dense, pruned, steps=3)
    assert torch.allclose(whole(WINDOWS).logits, parts(WINDOWS).logits, atol=1e-3)


@pytest.mark.parametrize("parameters", ["all", "restricted"])
def test_dense_and_pruned_models_stay_as_they_were_and_share_embeddings(parameters):
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    before = {name: p.clone() for model in (dense, pruned) for name, p in model.named_parameters()}
    logits = pruned(WINDOWS).logits
    student, _ = recovered(dense, pruned, parameters=parameters)
    assert torch.equal(pruned(WINDOWS).logits, logits)
    for name, parameter in pruned.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert student.transformer.wte.weight is dense.transformer.wte.weight
    assert student.lm_head.weight is dense.lm_head.weight
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    ("family", "alone"),
    [
        ("llama", {"self_attn.o_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight",
                   "post_attention_layernorm.weight"}),
        ("opt", {"self_attn.out_proj.weight", "fc2.weight", "self_attn_layer_norm.weight", "final_layer_norm.weight",
                 "self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.q_proj.bias", "self_attn.out_proj.bias",
                 "fc1.bias", "fc2.bias", "self_attn_layer_norm.bias", "final_layer_norm.bias"}),
    ],
)  # fmt: skip
def test_restricted_recovery_trains_output_projections_norms_and_biases_alone(family, alone):
    dense = tiny_model(family)
    pruned = remove_heads(dense, random_masks(3, 6)["uneven"])
    student, _ = recovered(dense, pruned, parameters="restricted")
    before = dict(pruned.named_parameters())
    changed = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.partition("layers.")[2].partition(".")[2] for name in changed} <= alone
    weights = {name for name in alone if name.endswith("weight")}
    assert weights <= {name.partition("layers.")[2].partition(".")[2] for name in changed}


def test_the_seed_decides():
    dense = tiny_model("llama")
    pruned = remove_heads(dense, random_masks(3, 6)["first layer emptied"])
    one, same, other = (recovered(dense, pruned, seed=seed)[0](WINDOWS).logits for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_every_window_is_seen_before_one_is_seen_again(monkeypatch):
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    seen = []
    forward = dense.forward
    monkeypatch.setattr(
        dense, "forward", lambda input_ids, **rest: seen.extend(input_ids.tolist()) or forward(input_ids, **rest)
    )
    recovered(dense, pruned, steps=6)
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(WINDOWS.tolist())
    assert seen[:6] != seen[6:]


def test_rate_and_parameters_are_the_best_of_the_grid_on_held_out_windows():
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    grid = [(rate, which) for which in ("all", "restricted") for rate in (1e-4, 3e-4, 1e-3)]
    assert recovery_grid("auto", "auto") == grid
    assert recovery_grid("auto", "all") == grid[:3]
    assert recovery_grid(0.5, "restricted") == [(0.5, "restricted")]
    student, cost = recovered(dense, pruned, learning_rate="auto", parameters="auto", held_out=HELD_OUT)
    alone = [recovered(dense, pruned, learning_rate=rate, parameters=which)[0] for rate, which in grid]
    apart = [divergence(dense, one, HELD_OUT[:, :]) for one in alone]
    # The last position predicts what is not in the window, so it does not count.
    by_hand = []
    for one in alone:
        p, q = (model(HELD_OUT).logits[:, :-1].log_softmax(-1) for model in (dense, one))
        by_hand.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert len(set(apart)) == 6
    best = by_hand.index(min(by_hand))
    assert [(trial.learning_rate, trial.parameters) for trial in cost.trials] == grid
    assert [trial.held_out_kl_nats for trial in cost.trials] == pytest.approx(by_hand, rel=1e-3)
    assert (cost.learning_rate, cost.parameters) == grid[best]
    assert torch.equal(student(WINDOWS).logits, alone[best](WINDOWS).logits)
    assert cost.tokens == 6 * 12 * 2 * 16


def test_held_out_loss_is_that_of_the_next_token():
    dense, other = tiny_gpt2(), tiny_gpt2(seed=1)
    _, loss = held_out_figures(dense, other, HELD_OUT)
    logits = other(HELD_OUT).logits[:, :-1].double().log_softmax(-1)
    by_hand = -logits.gather(-1, HELD_OUT[:, 1:, None]).mean()
    assert loss == pytest.approx(float(by_hand), rel=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [2, 7, 9, 16])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, killed_at):
    """Six steps for each of three rates; killed within the first, the second, or the third training."""
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    settings = {"steps": 6, "learning_rate": "auto", "held_out": HELD_OUT}
    whole, cost = recovered(dense, pruned, **settings)
    file = tmp_path / "recovery" / "cell.safetensors"
    count = []

    def kill(step):
        count.append(step)
        if len(count) == killed_at:
            raise Killed

    kept = {**settings, "checkpoint": file, "checkpoint_every_s": 0.0, "identity": "this"}
    with pytest.raises(Killed):
        recovered(dense, pruned, **kept, on_step=kill)
    assert file.is_file()
    steps = []
    again, same = recovered(dense, pruned, **kept, on_step=steps.append)
    assert len(steps) == 18 - killed_at
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert [trial.held_out_kl_nats for trial in same.trials] == [trial.held_out_kl_nats for trial in cost.trials]
    assert not file.parent.exists()


@pytest.mark.parametrize("what", ["another training", "not a checkpoint"])
def test_a_file_of_something_else_is_not_gone_on_from(tmp_path, what):
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    file = tmp_path / "cell.safetensors"
    if what == "another training":
        with pytest.raises(Killed):
            recovered(
                dense, pruned, checkpoint=file, checkpoint_every_s=0.0, identity="that",
                on_step=lambda step: (_ for _ in ()).throw(Killed) if step == 5 else None,
            )  # fmt: skip
    else:
        file.write_text("text")
    steps = []
    student, _ = recovered(dense, pruned, checkpoint=file, identity="this", on_step=steps.append)
    assert steps == list(range(1, 13))
    assert torch.equal(student(WINDOWS).logits, recovered(dense, pruned)[0](WINDOWS).logits)


def test_it_says_how_far_it_is(monkeypatch, caplog):
    dense = tiny_gpt2()
    monkeypatch.setattr(recovery, "NEWS_S", 0.0)
    with caplog.at_level("INFO", "pruning_comparison"):
        recovered(dense, remove_heads(dense, MASK), steps=2, what="recovery of this")
    assert [record.getMessage().partition(", KL")[0] for record in caplog.records] == [
        "recovery of this: step 1 of 2",
        "recovery of this: step 2 of 2",
    ]


def test_without_windows_or_a_known_choice_it_raises():
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    with pytest.raises(ValueError, match="held-out ones"):
        recovered(dense, pruned, learning_rate="auto")
    with pytest.raises(ValueError, match="choose one of all, restricted"):
        recovered(dense, pruned, parameters="some")
    assert math.isinf(recovery._or_infinite(math.nan))
