"""The training loop: what it computes, and what it refuses."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import adam, batches, network, same, sgd

from nncx.train import Supervised, error_rate, fit


class TestFit:
    def test_equals_the_loop_written_out(self):
        torch.manual_seed(0)
        model = network()
        reference = copy.deepcopy(model)
        torch.manual_seed(1)
        history = fit(model, batches(), epochs=3, optimizer=sgd(model.parameters()), progress=False)

        torch.manual_seed(1)
        optimizer, data = sgd(reference.parameters()), batches()
        for epoch in range(3):
            total = 0.0
            reference.train()
            for inputs, targets in data:
                loss = nn.functional.cross_entropy(reference(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(inputs)
            assert history[epoch] == {"epoch": epoch + 1, "loss": pytest.approx(total / 50)}
        same(model.state_dict(), reference.state_dict())

    def test_learns(self):
        torch.manual_seed(0)
        model, data = network(), batches()
        before = error_rate(model, data)
        history = fit(model, data, epochs=40, optimizer=adam(model.parameters()), progress=False)
        assert error_rate(model, data) < before / 3
        assert history[-1]["loss"] < history[0]["loss"] / 2

    def test_task_logs_every_scalar_and_validation(self):
        class Task(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(()))

            def forward(self, inputs, targets=None):
                return {
                    "loss": self.weight * inputs.mean(),
                    "count": torch.tensor(float(len(inputs))),
                    "logits": inputs,
                }

        task = Task()
        data = [(torch.ones(3, 1), torch.zeros(3)), (torch.zeros(1, 1), torch.zeros(1))]
        optimizer = torch.optim.SGD(task.parameters(), lr=0.0)
        history = fit(task, data, epochs=2, optimizer=optimizer, validate=lambda: 7, progress=False)
        expected = {"loss": 0.75, "count": 2.5, "validation": 7.0}  # means over samples
        assert history == [{"epoch": epoch, **expected} for epoch in (1, 2)]

    def test_several_optimizers_and_schedulers_all_step(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        optimizers = sgd(model[0].parameters()), adam(model[4].parameters())
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
        fit(model, batches(), epochs=2, optimizer=optimizers, scheduler=schedulers, progress=False)
        assert [o.param_groups[0]["lr"] for o in optimizers] == [0.1 / 4, 1e-2 / 4]
        after = model.state_dict()
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert {"0.weight", "4.weight"} <= changed and "1.weight" not in changed

    def test_trains_in_train_mode_after_a_validation_in_eval_mode(self):
        model, data, modes = network(), batches(), []
        model.register_forward_pre_hook(lambda module, _: modes.append(module.training))

        def validate():
            model.eval()
            return 0.0

        fit(
            model,
            data,
            epochs=2,
            optimizer=sgd(model.parameters()),
            validate=validate,
            progress=False,
        )
        assert modes and all(modes)

    def test_no_epochs(self):
        model = network()
        assert fit(model, batches(), epochs=0, optimizer=sgd(model.parameters())) == []

    def test_any_iterable(self):
        model, data = network(), [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
        history = fit(model, data, epochs=2, optimizer=sgd(model.parameters()), progress=False)
        assert len(history) == 2

    def test_compiled_task_is_a_task(self):
        task = torch.compile(Supervised(network()), backend="eager")
        history = fit(task, batches(), epochs=1, optimizer=sgd(task.parameters()), progress=False)
        assert history[0]["loss"] > 0

    def test_supervised_takes_a_criterion(self):
        model = nn.Linear(6, 1)
        task = Supervised(model, nn.MSELoss())
        inputs, targets = torch.randn(4, 6), torch.randn(4, 1)
        assert torch.equal(task(inputs, targets)["loss"], nn.MSELoss()(model(inputs), targets))

    def test_bad_arguments(self, tmp_path):
        model = network()
        optimizer = sgd(model.parameters())
        with pytest.raises(ValueError, match="epochs must be an integer of at least 0, got -1"):
            fit(model, batches(), epochs=-1, optimizer=optimizer)
        with pytest.raises(ValueError, match="at least one batch, got none"):
            fit(model, [], epochs=1, optimizer=optimizer)
        with pytest.raises(ValueError, match="can data be iterated again"):
            fit(model, iter(batches()), epochs=2, optimizer=optimizer, progress=False)
        with pytest.raises(FileNotFoundError, match="existing folder, got .*absent"):
            fit(model, [], epochs=1, optimizer=optimizer, checkpoint=tmp_path / "absent" / "run")

    def test_optimizers_that_do_not_train_the_task(self):
        model, other = network(), network()

        def refused(optimizer, message, task=model):
            before = copy.deepcopy(task.state_dict())
            with pytest.raises(ValueError, match=message):
                fit(task, batches(), epochs=1, optimizer=optimizer)
            same(task.state_dict(), before)

        for nothing in (None, []):
            refused(nothing, "at least one optimizer, got none")
        refused(sgd(other.parameters()), "but 6 of the 6 of SGD are not of Supervised")
        stale = [*model[0].parameters(), *other[4].parameters()]
        refused([sgd(model.parameters()), adam(stale)], "but 2 of the 4 of Adam are not of")
        refused(sgd(other.parameters()), "6 of the 6 of SGD are not", task=nn.Flatten())
        refused(torch.optim.LBFGS(model.parameters()), "without a closure, which LBFGS needs")
        other.requires_grad_(False)
        refused(sgd(other.parameters()), "requires a gradient, SGD has none", task=other)

    def test_frozen_parameters_may_be_in_an_optimizer(self):
        model = network()
        model[0].requires_grad_(False)
        before = model[0].weight.clone()
        fit(model, batches(), epochs=1, optimizer=sgd(model.parameters()), progress=False)
        assert torch.equal(model[0].weight, before)

    def test_schedulers_that_cannot_be_stepped(self):
        model = network()
        optimizer = sgd(model.parameters())
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        with pytest.raises(ValueError, match="without arguments, which ReduceLROnPlateau needs"):
            fit(model, batches(), epochs=1, optimizer=optimizer, scheduler=plateau)
        other = torch.optim.lr_scheduler.ExponentialLR(sgd(model.parameters()), 0.9)
        with pytest.raises(ValueError, match="an optimizer that is given, ExponentialLR is not"):
            fit(model, batches(), epochs=1, optimizer=optimizer, scheduler=other)

    @pytest.mark.parametrize("result", [torch.tensor(1.0), {}, {"loss": 1.0}, {"loss": [1, 2]}])
    def test_task_without_a_loss(self, result):
        class Task(nn.Linear):
            def forward(self, inputs, targets):
                return result

        task = Task(1, 1)
        with pytest.raises(ValueError, match="scalar tensor 'loss', Task did not"):
            fit(task, batches(), epochs=1, optimizer=sgd(task.parameters()))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_loss_that_is_not_finite(self, tmp_path, value):
        model, path = network(), tmp_path / "run.safetensors"
        options = {"optimizer": sgd(model.parameters()), "checkpoint": path, "progress": False}
        fit(model, batches(), epochs=2, **options)
        whole = path.read_bytes()

        class Diverged(nn.Module):
            def forward(self, logits, targets):
                return logits.sum() * 0 + value

        with pytest.raises(FloatingPointError, match=f"epoch 3, .*loss {value}"):
            fit(Supervised(model, Diverged()), batches(), epochs=5, **options)
        assert path.read_bytes() == whole


class TestPatience:
    def run(self, epochs, validations, patience=2, checkpoint=None):
        """Epoch i validates to `validations[i - 1]`; how many epochs there were."""
        model = network()
        history = fit(
            model,
            batches(),
            epochs=epochs,
            optimizer=sgd(model.parameters()),
            validate=iter(validations).__next__,
            patience=patience,
            checkpoint=checkpoint,
            progress=False,
        )
        return len(history)

    def test_stops_when_the_lowest_is_so_many_epochs_old(self):
        assert self.run(9, [5, 3, 4, 3]) == 4  # equal is not lower
        assert self.run(9, [float("nan")] * 2) == 2
        assert self.run(3, [5, 3, 4]) == 3
        assert self.run(5, [5, 6, 4, 6, 3]) == 5

    def test_a_resumed_run_stays_stopped(self, tmp_path):
        path = tmp_path / "run"
        assert self.run(9, [3, 4, 5], checkpoint=path) == 3
        assert self.run(20, [], checkpoint=path) == 3
        assert self.run(20, [6], patience=3, checkpoint=path) == 4

    def test_says_so(self, capsys):
        model = network()
        optimizer = sgd(model.parameters())
        options = {"optimizer": optimizer, "validate": lambda: 1.0, "patience": 1}
        fit(model, batches(), epochs=9, **options)
        assert capsys.readouterr().err.splitlines()[2:] == [
            "stopped: validation has not fallen for 1 epochs"
        ]

    @pytest.mark.parametrize("patience", [0, -1, 1.5, True])
    def test_bad_patience(self, patience):
        with pytest.raises(ValueError, match="patience must be an integer of at least 1, or None"):
            self.run(1, [], patience=patience)

    def test_needs_a_validation(self):
        model = network()
        with pytest.raises(ValueError, match="patience waits for what validate returns"):
            fit(model, [], epochs=1, optimizer=sgd(model.parameters()), patience=1)


class TestMixedPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_equals_the_loop_written_out(self, dtype):
        torch.manual_seed(0)
        model = network()
        reference = copy.deepcopy(model)
        seen = []
        model[0].register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
        torch.manual_seed(1)
        optimizer = sgd(model.parameters())
        fit(model, batches(), epochs=2, optimizer=optimizer, amp=dtype, progress=False)

        torch.manual_seed(1)
        optimizer, data = sgd(reference.parameters()), batches()
        scale = 2.0**16 if dtype == torch.float16 else 1.0
        for _ in range(2):
            for inputs, targets in data:
                with torch.autocast("cpu", dtype):
                    loss = nn.functional.cross_entropy(reference(inputs), targets)
                optimizer.zero_grad()
                (loss * scale).backward()
                for parameter in reference.parameters():
                    parameter.grad /= scale
                if all(parameter.grad.isfinite().all() for parameter in reference.parameters()):
                    optimizer.step()
                else:
                    scale /= 2
        assert set(seen) == {dtype}
        same(model.state_dict(), reference.state_dict())

    def test_float16_skips_a_step_whose_gradients_overflow(self):
        class Task(nn.Linear):
            def forward(self, inputs, targets):
                return {"loss": (self.weight.half() * 2.0**12).sum().float()}

        task = Task(1, 1, bias=False)
        before = task.weight.item()
        optimizer = torch.optim.SGD(task.parameters(), lr=2.0**-12)
        data = [(torch.ones(1, 1), torch.zeros(1))] * 2
        fit(task, data, epochs=1, optimizer=optimizer, amp=torch.float16, progress=False)
        assert task.weight.item() == before  # 2 ** 28, then 2 ** 27: halved for the next

    def test_bad_dtype(self):
        model = network()
        for amp in (torch.float32, "bfloat16"):
            with pytest.raises(ValueError, match="amp must be torch.bfloat16, torch.float16 or"):
                fit(model, [], epochs=1, optimizer=sgd(model.parameters()), amp=amp)


class TestClumsyCalls:
    @pytest.mark.parametrize("epochs", [2.0, "2", None, True])
    def test_epochs(self, epochs):
        model = network()
        with pytest.raises(ValueError, match="epochs must be an integer of at least 0, got "):
            fit(model, batches(), epochs=epochs, optimizer=sgd(model.parameters()))

    def test_the_class_instead_of_a_model(self):
        with pytest.raises(TypeError, match="fit: task must be an nn.Module, got Supervised"):
            fit(Supervised, batches(), epochs=1, optimizer=sgd(network().parameters()))

    @pytest.mark.parametrize(
        "batch",
        [{"x": 1, "y": 2}, torch.ones(2, 6), (torch.ones(2, 6),), (torch.ones(2, 6), [0, 1]), "ab"],
        ids=["dict", "tensor", "one", "labels", "text"],
    )
    def test_data_without_pairs(self, batch):
        model = network()
        with pytest.raises(
            ValueError, match=r"data must give pairs \(inputs, targets\) of tensors"
        ):
            fit(model, [batch], epochs=1, optimizer=sgd(model.parameters()))

    def test_a_folder_as_checkpoint(self, tmp_path):
        model = network()
        for resume in (True, False):
            with pytest.raises(IsADirectoryError, match="must be a file, got the folder"):
                optimizer = sgd(model.parameters())
                where = {"checkpoint": tmp_path, "resume": resume}
                fit(model, batches(), epochs=1, optimizer=optimizer, **where)


class TestProgress:
    def run(self, progress):
        model = network()
        fit(
            model,
            batches(),
            epochs=2,
            optimizer=sgd(model.parameters()),
            validate=lambda: 12.5,
            progress=progress,
        )

    def test_a_line_an_epoch_without_a_terminal(self, capsys):
        self.run(progress=True)
        output = capsys.readouterr()
        first, second = output.err.splitlines()
        assert first.startswith("epoch 1/2  loss ") and second.startswith("epoch 2/2  loss ")
        assert "validation 12.5" in first and first.endswith(" s")
        assert output.out == ""

    def test_a_line_when_resumed(self, tmp_path, capsys):
        path = tmp_path / "run"
        for _ in range(2):
            model = network()
            optimizer = sgd(model.parameters())
            fit(model, batches(), epochs=2, optimizer=optimizer, checkpoint=path)
        assert capsys.readouterr().err.splitlines()[2:] == [f"resumed {path}: 2 of 2 epochs done"]

    def test_silent(self, capsys):
        self.run(progress=False)
        assert capsys.readouterr() == ("", "")

    def test_a_bar_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        self.run(progress=True)
        output = capsys.readouterr()
        assert "epoch 2/2  loss " in output.err and output.out == ""


class TestErrorRate:
    def test_is_the_share_of_wrong_samples(self):
        logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        targets = torch.tensor([0, 1, 1, 1, 0])
        data = DataLoader(TensorDataset(logits, targets), 2)
        assert error_rate(nn.Identity(), data) == 40.0

    def test_runs_in_eval_mode_and_gives_every_mode_back(self):
        model = network().train()
        model[1].eval()
        seen = []
        model[3].register_forward_hook(lambda module, *_: seen.append(module.training))
        before = copy.deepcopy(model.state_dict())
        assert error_rate(model, batches()) == error_rate(model, batches())
        same(model.state_dict(), before)
        assert not any(seen)
        assert [m.training for m in model] == [True, False, True, True, True]
        assert model.training

    def test_needs_samples(self):
        with pytest.raises(ValueError, match="at least one sample"):
            error_rate(network(), [])
