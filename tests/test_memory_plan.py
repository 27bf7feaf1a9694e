"""The memory plan: what is counted, what it chooses, what it reports, and what happens when memory runs out."""

import dataclasses
import gc
import json
import types
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import train_qlora as stage
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError
from glm_utils.collators import PackingCollator
from glm_utils.load_model import load_base_model
from glm_utils.training.memory_plan import count_saved_bytes, make_plan
from glm_utils.training.preflight import batch_tokens, memory_advice
from glm_utils.training.steps import num_steps
from glm_utils.training.trainer import LoraTrainer


@pytest.fixture
def batch(fixture_dir):
    golden = np.load(fixture_dir / "train_single.npz")
    example = {key: golden[key][0].tolist() for key in ("input_ids", "labels")}
    return PackingCollator()([example, example])


@pytest.fixture
def plan(golden_model, batch):
    golden_model.gradient_checkpointing_enable({"use_reentrant": False})
    return make_plan(golden_model, batch, None)


def blocks(model):
    return [module for module in model.modules() if type(module).__name__ == "GLMBlock"]


def test_counting_changes_and_keeps_nothing(golden_model, batch):
    outputs = []
    hook = blocks(golden_model)[0].register_forward_hook(
        lambda module, inputs, output: outputs.append(weakref.ref(output[0]))
    )
    state = torch.random.get_rng_state()
    first, second = (count_saved_bytes(golden_model, blocks(golden_model), batch) for _ in range(2))
    hook.remove()
    gc.collect()
    assert first == second > 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert golden_model.training is False
    assert [output() for output in outputs] == [None, None]


def test_the_count_is_what_autograd_keeps(golden_model, batch):
    """Like a plain pass whose graph holds everything to its end; what several blocks share counts once per block."""
    weights, kept = {weight.untyped_storage().data_ptr() for weight in golden_model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = kept.get(storage.data_ptr(), storage.nbytes())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = golden_model.train()(**batch).loss
    expected = sum(size for address, size in kept.items() if address not in weights)
    del loss
    found = count_saved_bytes(golden_model, blocks(golden_model), batch)
    assert expected <= found <= 1.1 * expected


def test_counting_holds_one_block_at_a_time(golden_model, batch):
    """What the first block kept is there until it ends and gone when the last one has run."""
    kept, alive, gone = [], [], []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            memory = np.empty(tuple(x.shape), dtype=np.float32)  # lives as long as the tensor's storage
            kept.append(weakref.ref(memory))
            y = torch.from_numpy(memory).copy_(x)
            ctx.save_for_backward(y)
            return y * 1

        @staticmethod
        def backward(ctx, grad):
            return grad

    layers = blocks(golden_model)
    first = layers[0].register_forward_hook(lambda module, args, output: (Keep.apply(output[0]), *output[1:]))
    second = layers[1].register_forward_pre_hook(lambda *_: alive.append(kept[0]() is not None), prepend=True)
    last = layers[-1].register_forward_hook(lambda *_: gone.append(kept[0]() is None))
    count_saved_bytes(golden_model, layers, batch)
    first.remove(), second.remove(), last.remove()
    assert alive == [True]
    assert gone == [True]


def test_the_count_grows_with_the_tokens(golden_model, batch):
    layers, first_position = blocks(golden_model), batch["loss_positions"][:1]
    one = count_saved_bytes(golden_model, layers, {**batch, "loss_positions": first_position})
    twice = {key: torch.cat((batch[key], batch[key]), dim=-1) for key in ("input_ids", "labels")}
    limits = batch["cu_seq_lens_q"]
    twice["cu_seq_lens_q"] = torch.cat((limits, limits[1:] + limits[-1]))
    twice |= {"max_length_q": batch["max_length_q"], "loss_positions": first_position}
    assert count_saved_bytes(golden_model, layers, twice) == pytest.approx(2 * one, rel=0.02)


def test_no_more_blocks_are_recomputed_than_must(plan):
    num_layers, tokens = len(plan.layers), 1000
    by_limit = [
        dataclasses.replace(plan, limit_bytes=plan.peak_bytes(tokens, number)).num_recomputed(tokens)
        for number in range(num_layers)
    ]
    assert by_limit == list(range(num_layers))
    assert dataclasses.replace(plan, limit_bytes=0).num_recomputed(tokens) == num_layers
    tight = dataclasses.replace(plan, limit_bytes=plan.peak_bytes(tokens, 1))
    assert tight.num_recomputed(tokens // 2) <= 1 <= tight.num_recomputed(2 * tokens)
    assert dataclasses.replace(tight, checkpointing=True).num_recomputed(1) == num_layers
    assert dataclasses.replace(tight, checkpointing=False).num_recomputed(10**9) == 0
    assert not plan.is_offloaded(tokens)


def test_the_chosen_blocks_are_recomputed_and_gradients_stay(golden_model, plan, batch):
    num_tokens, gradients, recomputed = batch["input_ids"].numel(), [], []
    limits = [plan.peak_bytes(num_tokens, number) for number in range(len(plan.layers))]
    for limit in (*limits, 0):
        choice = dataclasses.replace(plan, limit_bytes=limit)
        golden_model.train().zero_grad()
        with choice.applied(num_tokens):
            recomputed.append(sum(layer.gradient_checkpointing for layer in plan.layers))
            golden_model(**batch).loss.backward()
        gradients.append([weight.grad.clone() for weight in golden_model.parameters() if weight.grad is not None])
    assert recomputed == list(range(len(plan.layers) + 1))
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


@pytest.mark.gpu
def test_states_on_the_host_change_no_gradient(golden_model, batch):
    golden_model.cuda().train().gradient_checkpointing_enable({"use_reentrant": False})
    batch = {key: value.cuda() if torch.is_tensor(value) else value for key, value in batch.items()}
    plan, gradients = make_plan(golden_model, batch, None), []
    for limit in (plan.limit_bytes, 0):
        choice = dataclasses.replace(plan, limit_bytes=limit)
        assert choice.is_offloaded(batch["input_ids"].numel()) is (limit == 0)
        golden_model.zero_grad()
        with choice.applied(batch["input_ids"].numel()):
            golden_model(**batch).loss.backward()
        gradients.append([weight.grad.clone() for weight in golden_model.parameters() if weight.grad is not None])
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*gradients, strict=True))


def test_batches_of_one_epoch():
    lengths = [3, 5, 7, 11, 13]
    packed, padded = batch_tokens(lengths, 2, True), batch_tokens(lengths, 2, False)
    assert len(packed) == len(padded) == 3
    assert packed.sum() == sum(lengths)
    assert (padded >= packed).all()
    assert batch_tokens(lengths, 8, True).tolist() == [39]
    assert batch_tokens(lengths, 8, False).tolist() == [65]


def test_batches_of_similar_lengths_vary_more():
    lengths = np.random.default_rng(1).integers(1, 100, 400).tolist()
    packed, padded = (batch_tokens(lengths, 8, packing, group_size=16) for packing in (True, False))
    assert packed.max() > 1.1 * batch_tokens(lengths, 8, True).max()
    assert packed.sum() == sum(lengths)
    assert padded.sum() < 1.1 * packed.sum() < batch_tokens(lengths, 8, False).sum()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_steps_are_the_trainers(golden_model, tmp_path, drop_last, parts):
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=parts, use_cpu=True,
        num_train_epochs=1.5, dataloader_drop_last=drop_last, report_to="none", max_steps=-1,
    )  # fmt: skip
    trainer = LoraTrainer(model=golden_model, args=args, train_dataset=[{}] * 11)
    loader = trainer.get_train_dataloader()
    assert len(loader) == (5 if drop_last else 6)
    per_epoch = max(1, len(loader) // parts + bool(len(loader) % parts))
    assert num_steps(11, args) == int(np.ceil(1.5 * per_epoch))
    assert num_steps(11, dataclasses.replace(args, max_steps=7)) == 7


def test_advice_names_what_helps():
    def advise(size, checkpointing):
        args = types.SimpleNamespace(
            per_device_train_batch_size=size, gradient_accumulation_steps=3, activation_checkpointing=checkpointing,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        return memory_advice(args)

    text = advise(8, True)
    assert "halve per_device_train_batch_size (now 8) and double gradient_accumulation_steps (now 3)" in text
    assert "gradient_checkpointing" not in text
    assert "delete activation_checkpointing (or gradient_checkpointing) false" in advise(1, False)
    assert "halve" not in advise(1, False)


# ---- the stage


@pytest.fixture
def train(write, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"content": f"类型#{kind}", "summary": f"{kind}百搭。" * 3} for kind in ("上衣", "裤子", "裙子", "外套")]
    data = write("train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def run(name="out", args=None, **flags):
        values = {"output_dir": name, "per_device_train_batch_size": 2, "max_steps": 12, "report_to": "none"}
        path = write("args.json", {**values, "save_strategy": "no", "disable_tqdm": True, **(args or {})})
        stage.train_qlora(
            train_args_json=str(path), train_data_path=str(data), model_name_or_path=str(model_dir), **flags
        )
        return tmp_path / name

    return run


def test_a_dry_run_reports_and_writes_nothing(train, tmp_path, log_lines, monkeypatch):
    monkeypatch.setattr(LoraTrainer, "train", lambda *args, **kwargs: pytest.fail("training started"))
    train(dry_run=True, lora_rank=2)
    text = "\n".join(log_lines)
    assert "LoRA on query_key_value: " in text
    assert "per step: 2 examples, about " in text
    assert "(no padding)" in text
    assert "; 12 steps" in text
    assert "activation checkpointing in 0 of " in text
    assert not (tmp_path / "out").exists()


def test_the_time_per_epoch_is_logged(train, log_lines):
    train()
    assert sum(" per epoch of 2 steps" in line for line in log_lines) == 1


def test_running_out_of_memory_names_the_setting_and_keeps_checkpoints(train, monkeypatch):
    def fail(self, model, inputs, num_items_in_batch=None, step=Trainer.training_step):
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, model, inputs, num_items_in_batch)

    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", fail)
        with pytest.raises(
            UserError, match=r"out of memory in step 3 on a batch of \d+ tokens.*halve per_device_train"
        ):
            train(args=args)
    out = train(args=args, resume_from_checkpoint="latest")
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_running_out_of_memory_in_the_evaluation_names_its_own_setting(train, monkeypatch):
    def fail(self, *args, forward=LoraTrainer.compute_loss_context_manager):
        if not self.model.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args)

    monkeypatch.setattr(LoraTrainer, "compute_loss_context_manager", fail)
    with pytest.raises(UserError, match=r"in the evaluation on a batch of \d+ tokens.*Halve per_device_eval"):
        train(args={"per_device_eval_batch_size": 2, "max_steps": 1}, eval_data_path="train.jsonl")


def test_the_trainer_may_find_the_batch_size(train, monkeypatch):
    sizes = []

    def fail(self, model, inputs, num_items_in_batch=None, step=Trainer.training_step):
        sizes.append(len(inputs["cu_seq_lens_q"]) - 1)
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(Trainer, "training_step", fail)
    out = train(args={"auto_find_batch_size": True, "max_steps": 1})
    assert sizes == [2, 1]
    assert (out / "adapter_model.safetensors").is_file()


def test_packed_and_padded_runs_learn_the_same(train):
    """One step of plain SGD on the same examples: equal weights, in fp32."""
    args = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "warmup_steps": 0}
    args |= {"per_device_train_batch_size": 4, "train_sampling_strategy": "random"}
    states = [
        load_file(train(name, args=args, packing=packing, lora_dropout=0.0) / "adapter_model.safetensors")
        for name, packing in (("packed", True), ("padded", False))
    ]
    assert any(states[0][key].abs().max() > 0 for key in states[0] if "lora_B" in key)
    assert all(torch.allclose(states[0][key], states[1][key], atol=1e-6) for key in states[0])


def test_the_loss_never_holds_all_logits(model_dir, batch, sibling, monkeypatch):
    """No tensor of a training pass is as large as the logits of all tokens."""
    model = load_base_model(open_checkpoint(model_dir)).train().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    weight, rows = model.get_output_embeddings().weight, []
    vocabulary = len(weight)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.shape[-1:] == (vocabulary,) and out.data_ptr() != weight.data_ptr():
                rows.append(out.numel() // vocabulary)
            return out

    monkeypatch.setattr(sibling("fused_chatglm"), "CHUNK_LOGITS", 4 * vocabulary)
    with Watch():
        model(**batch).loss.backward()
    assert len(batch["loss_positions"]) > 8
    assert max(rows) == 4
