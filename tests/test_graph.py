"""CUDA graphs, without a GPU: what is recorded keeps the rules of a recording, in every network."""

import importlib
from unittest import mock

import pytest
import torch
from test_train import arguments, log_of, make_run, petct_root  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import baselines
import graph
import kernels
import predict
import train
from config import Config, check, parse_config
from files import UserError
from mirror_unet import TASKS

dice_ce_file = importlib.import_module("kernels.dice_ce")
norm_act_file = importlib.import_module("kernels.norm_act")
slow = pytest.mark.slow
pytestmark = [slow, pytest.mark.usefixtures("recomputing")]  # as on a GPU


# ----------------------------------------------------------------------------- rules of a recording
class Forbidden(Exception):
    """Something that a CUDA graph cannot hold."""


HOST = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)
HOST += (torch.Tensor.pin_memory, torch.Tensor.__bool__, torch.Tensor.__float__)
FRESH = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)
MAKERS = (torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.rand, torch.randn)


class Calls(TorchFunctionMode):
    """Fails on calls that read a tensor on the host, or that make one there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in HOST or (func is torch.Tensor.to and "cpu" in args):
            raise Forbidden(f"the host waits for {func}")
        if func in FRESH or (func in MAKERS and kwargs.get("device") is None):
            raise Forbidden(f"{func} makes a tensor on the host")
        if func is torch.manual_seed:
            raise Forbidden("a seed is set")
        return func(*args, **kwargs)


class Rules(TorchDispatchMode):
    """Fails on what a recording cannot hold, and lists every operation with what it allocates."""

    OPS = {op._opoverload: op for op in (dice_ce_file._dice_ce, dice_ce_file._dice_ce_backward)}

    def __init__(self):
        super().__init__()
        self.operations, self.calls = [], Calls()

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.OPS:  # look inside
            with self:
                return self.OPS[func]._init_fn(*args, **(kwargs or {}))
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is torch.ops.aten.index.Tensor:  # by a mask, or by numbers
            tags = any(i is not None and i.dtype == torch.bool for i in args[1])
        if tags or func is torch.ops.aten.lift_fresh.default:
            raise Forbidden(f"{func} depends on values, or reads the host's memory")
        out = func(*args, **(kwargs or {}))
        made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.operations.append((str(func), [(t.dtype, t.shape, t.stride()) for t in made]))
        return out


BREAKS = {
    "item": lambda x: x.sum().item(),
    "a comparison": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "a fresh tensor": lambda x: x + torch.tensor([1.0, 2.0]),
    "a tensor on the host": lambda x: x + torch.zeros(2),
    "a seed": lambda x: torch.manual_seed(0),
    "a check of labels": lambda x: kernels.dice_ce_plain(x[None, :, None], x[None, :1].long() * 0),
}


@pytest.mark.parametrize("call", BREAKS.values(), ids=BREAKS)
def test_the_rules_notice(call):
    with pytest.raises(Forbidden), Rules():
        call(torch.tensor([1.0, -2.0]))


def test_the_rules_allow_what_stays_on_the_device():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    with Rules() as rules:
        y = x[torch.zeros(2, dtype=torch.long, device=x.device)] * x.new_ones(2)
        torch.where(y > 0, y, 0).sum().backward()
    assert "aten.index.Tensor" in dict(rules.operations)


# ---------------------------------------------------------------------------------- every network
@pytest.fixture
def unlaunched(monkeypatch):
    """The Triton path on CPU tensors, up to the launches, which do nothing."""

    def start(kernel, grid, given):
        return lambda *values: None, [], []

    monkeypatch.setattr(norm_act_file, "_start", start)
    monkeypatch.setattr(norm_act_file, "_PLANS", {})
    monkeypatch.setattr(dice_ce_file, "_run", lambda kernel, grid, args: args)
    monkeypatch.setattr(kernels, "_on_triton", lambda x: True)


def new_run(model: str, task: str, **options) -> train.Run:
    """A run with a graph, of a tiny network on 32^3 voxels, without studies."""
    data = "phantom" if task == "petct" else "phantom-brain"
    c = Config(model=model, data=data, patch=(32, 32, 32), channels=(2, 3, 4, 5, 6))
    for name, value in {"ema": 0.9, "device": "cpu", **options}.items():
        setattr(c, name, value)
    check(c)
    c.graph = True  # refused on a CPU
    return train.Run(c, [], [])


def fill(inputs: dict) -> dict:
    """Other values in the same memory."""
    inputs["image"].uniform_()
    inputs["x"].copy_(inputs["image"])
    inputs["label"].random_(0, 2)
    inputs["tumor"].random_(0, 2)
    return inputs


def make_inputs(channels_last: bool) -> dict:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    image = torch.empty(2, 2, 32, 32, 32)
    label = torch.empty(2, 1, 32, 32, 32, dtype=torch.int64)
    return {"image": image, "label": label, "tumor": torch.empty(2)} | {
        "x": torch.empty_like(image, memory_format=layout)
    }


SYSTEMS = [("petct", name) for name in (*TASKS["petct"], *baselines.NAMES["petct"])]
SYSTEMS += [("brain", name) for name in (*TASKS["brain"], *baselines.NAMES["brain"])]
CASES = []
for number, (task, name) in enumerate(s for s in SYSTEMS if s[1] != "valindria"):
    for last in (True, False):
        for amp in ("off", "bf16", "fp16"):
            quick = (name == "v3" and last or number % 12 == 5) and amp == "off"
            case = pytest.param(task, name, last, amp, marks=[] if quick else [slow])
            CASES.append(case)


@pytest.mark.parametrize("task,name,channels_last,amp", CASES)
def test_a_training_step_keeps_the_rules(unlaunched, one_thread, task, name, channels_last, amp):
    run = new_run(name, task, channels_last=channels_last, batch=2)
    run.c.amp = amp  # after the scaler of fp16 was left out
    run.optimizer.param_groups[0]["lr"] = run.rates[0]
    inputs = make_inputs(channels_last)
    run.learn(**fill(inputs))  # the optimizer gets its memory
    steps = []
    for _ in range(2):
        fill(inputs)
        with Rules() as rules:
            run.learn(**inputs)
        steps.append(rules.operations)
    assert steps[0] == steps[1]
    assert len(steps[0]) > 100


@pytest.mark.parametrize("task,name,channels_last,amp", CASES)
def test_a_batch_of_windows_keeps_the_rules(
    unlaunched, one_thread, task, name, channels_last, amp
):
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    run = new_run(name, task, channels_last=channels_last)
    regions = []

    class Watched(graph.Graph):
        def warm_up(self):
            with Rules() as rules:
                outputs = super().warm_up()
            regions.append(rules.operations)
            return outputs

    image = torch.rand(2, 32, 32, 96)  # five windows
    with mock.patch.object(predict, "Graph", Watched), mock.patch.object(graph, "WARM_UP", 99):
        model = run.model.to(memory_format=layout)
        predict.predict_image(model, image, (32, 32, 32), 0.5, 2, (0,), amp, graph=True)
    assert len(regions) == 3 and regions[1] == regions[2]  # the first one plans its launches


# --------------------------------------------------------------------------------- graphs, imitated
def imitate(make_outputs):
    """A `record` that fills the outputs at each replay, as a CUDA graph does."""

    def record(function, inputs, stream):
        outputs = make_outputs()

        def replay():
            results = function(**inputs)
            pairs = [(outputs, results)] if torch.is_tensor(results) else zip(outputs, results)
            for out, result in pairs:
                out.copy_(result)

        return replay, outputs

    return record


def test_inputs_stay_at_one_place_and_a_smaller_batch_gets_its_rows(monkeypatch):
    seen = []

    def function(x):
        seen.append((x.data_ptr(), x.shape))
        return 2 * x, x.new_ones(())

    outputs = torch.empty(3, 2), torch.empty(())
    monkeypatch.setattr(graph, "record", imitate(lambda: outputs))
    double = graph.Graph(function, torch.device("cpu"), rows=True)
    for n in range(6):
        x = torch.full((3, 2), float(n))
        assert torch.equal(double(x=x)[0], 2 * x)
    last = double(x=torch.ones(2, 2))
    assert torch.equal(last[0], torch.full((2, 2), 2.0)) and last[1] == 1
    assert len(seen) == 7 and len(set(seen)) == 1


@slow
def test_a_run_with_a_graph_is_the_run_without(arguments, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(train.Run, "report", lambda *_: None)  # pictures take time
    args = [*arguments, "--model", "v3", "--steps", "7", "--ema", "0.9", "--validations", "2"]
    plain = make_run(args)
    plain.train()
    args[args.index("--out") + 1] = str(tmp_path / "graph")
    args = parse_config(args)
    args.graph = True  # refused on a CPU
    train.prepare_folder(args)
    run = train.Run(args, plain.train_cases, plain.val_cases)
    monkeypatch.setattr(graph, "record", imitate(lambda: torch.empty(len(run.names))))
    run.train()
    assert run.graph.replay is not None
    ours, theirs = ([r for r in log_of(x.folder) if "loss" in r] for x in (run, plain))
    assert [row["step"] for row in ours] == list(range(1, 8))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        same_time = {"seconds": one["seconds"]}
        assert one == pytest.approx(other | same_time, rel=1e-4)
    pairs = zip(run.ema_model.parameters(), plain.ema_model.parameters(), strict=True)
    for ours, theirs in pairs:
        if theirs.dim() > 1:  # Adam makes steps of rounding errors, for biases before a norm
            assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run(arguments):  # noqa: F811
    options = "--model v3 --steps 9 --validations 1 --ema 0.5 --norm batch".split()
    c = parse_config([*arguments, *options])
    c.graph = True
    train.prepare_folder(c)
    run = train.Run(c, *train.load_cases(c))
    batch = next(iter(run.batches()))
    assert run.train_step(batch) == {}
    run.step = 1
    state = [*run.model.state_dict().values(), *run.ema_model.state_dict().values()]
    before = [t.clone() for t in state]
    row = run.train_step(batch | {"image": batch["image"] * torch.nan})
    assert row["step"] == 1 and row["loss"] > 0
    assert all(torch.equal(t, b) for t, b in zip(state, before, strict=True))
    with pytest.raises(UserError, match="the loss is nan at step 2"):
        run.judge_late()


def test_the_message_names_the_step_that_a_resumed_run_continues_from(arguments):  # noqa: F811
    c = parse_config([*arguments, *"--model v3 --steps 9 --validations 1".split()])
    c.graph = True
    train.prepare_folder(c)
    run = train.Run(c, *train.load_cases(c))
    batch = next(iter(run.batches()))
    run.train_step(batch)
    run.step = 1
    run.save("last.pt", now=False)  # written when the numbers of step 2 are read, during step 3
    run.train_step(batch)
    run.step = 2
    run.train_step(batch | {"image": batch["image"] * torch.nan})
    assert torch.load(run.folder / "last.pt", weights_only=True)["step"] == 1
    with pytest.raises(UserError, match="is nan at step 3.*continues from step 1,"):
        run.judge_late()


# ------------------------------------------------------------------------------------- what forbids
@pytest.mark.parametrize(
    "options,words",
    [
        (["--device", "cpu"], "a CPU"),
        (["--amp", "fp16"], "--amp fp16"),
        (["--model", "valindria"], "valindria"),
        (["--compile"], "--compile"),
    ],
)
def test_what_does_not_go_with_a_graph_is_refused(monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_config(["--graph", "--device", "cuda"]).graph
    with pytest.raises(UserError, match=f"--graph does not go with {words}"):
        parse_config(["--graph", *options])


def test_several_processes_do_not_go_with_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--graph does not go with torchrun"):
        parse_config(["--graph", "--device", "cuda"])


def test_a_prediction_with_a_graph_needs_a_gpu():
    words = ["--checkpoint", "a.pt", "--pet", "a.nii.gz", "--out", "b.nii.gz", "--graph"]
    with pytest.raises(UserError, match="--graph: CUDA graphs need --device cuda"):
        predict.parse_arguments([*words, "--device", "cpu"])


# ----------------------------------------------------------------------- what else a GPU waits for
def test_cudnn_chooses_its_algorithms_by_measuring(unlaunched, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    new_run("v1", "petct")
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("task,name", SYSTEMS)
def test_no_convolution_has_to_copy_its_input(unlaunched, one_thread, task, name):
    """A slice of a channels_last batch, for example, would be copied by each that reads it."""
    run = new_run(name, task, channels_last=True)
    dense = []

    def look(module, inputs):
        formats = (torch.contiguous_format, torch.channels_last_3d)
        dense.append(any(inputs[0].is_contiguous(memory_format=f) for f in formats))

    for module in run.model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_pre_hook(look)
    run.model(fill(make_inputs(channels_last=True))["x"])
    with predict.evaluating(run.model):
        predict.foreground_probability(run.model, torch.rand(2, 2, 32, 32, 32))
    assert len(dense) > 10 and all(dense)
