"""A resumed run equals an uninterrupted one, and a file that is not its own is refused."""

import copy
import math
import os
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training import Interrupting, adam, batches, network, numpy_sgd, same, samples, sgd

from nncx import _checkpoint, _files
from nncx.train import Supervised, error_rate, fit

SCHEDULERS = {
    "none": lambda optimizer: None,
    "multistep": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 5], 0.5),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "warmup": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ],
        milestones=[2],
    ),
}


class TestResume:
    def run(
        self, make_optimizer, make_scheduler, epochs, checkpoint=None, seed=0, wrap=None, amp=None
    ):
        """All that a new process would make, its random state included, then fit."""
        torch.manual_seed(seed)
        model, data = network(), batches(seed)
        task = Supervised(wrap(model) if wrap else model)
        optimizer = make_optimizer(task.parameters())
        scheduler = make_scheduler(optimizer)
        history = fit(
            task,
            data,
            epochs=epochs,
            optimizer=optimizer,
            scheduler=scheduler,
            validate=lambda: error_rate(model, batches(shuffle=False)),
            amp=amp,
            checkpoint=checkpoint,
            progress=False,
        )
        return {
            "history": history,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler else None,
            "random": [torch.get_rng_state(), data.generator.get_state()],
        }

    @pytest.mark.parametrize("schedule", SCHEDULERS)
    @pytest.mark.parametrize("make_optimizer", [sgd, adam, numpy_sgd])
    def test_resumed_equals_uninterrupted(self, tmp_path, make_optimizer, schedule):
        path = tmp_path / "run.safetensors"
        parts = make_optimizer, SCHEDULERS[schedule]
        whole = self.run(*parts, epochs=6)
        self.run(*parts, epochs=2, checkpoint=path)
        self.run(*parts, epochs=3, checkpoint=str(path), seed=8)
        resumed = self.run(*parts, epochs=6, checkpoint=path, seed=9)
        same(resumed, whole)
        assert [record["epoch"] for record in whole["history"]] == [1, 2, 3, 4, 5, 6]

    def test_interrupted_in_an_epoch(self, tmp_path):
        path = tmp_path / "run.safetensors"
        parts = adam, SCHEDULERS["multistep"]
        whole = self.run(*parts, epochs=5, wrap=lambda model: Interrupting(model, -1))
        with pytest.raises(KeyboardInterrupt, match=f"{path} holds 2 of 5 epochs; run again"):
            # 4 batches an epoch: in the third batch of the third epoch
            self.run(*parts, epochs=5, checkpoint=path, wrap=lambda model: Interrupting(model, 11))
        assert os.listdir(tmp_path) == [path.name]
        resumed = self.run(
            *parts, epochs=5, checkpoint=path, seed=9, wrap=lambda model: Interrupting(model, -1)
        )
        same(resumed, whole)

    def test_interrupted_before_the_first_epoch_was_complete(self, tmp_path):
        with pytest.raises(KeyboardInterrupt, match="nothing to resume"):
            self.run(
                sgd,
                SCHEDULERS["none"],
                epochs=5,
                checkpoint=tmp_path / "run",
                wrap=lambda model: Interrupting(model, 2),
            )
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
    def test_in_mixed_precision(self, tmp_path, amp):
        parts, path = (adam, SCHEDULERS["none"]), tmp_path / "run"
        whole = self.run(*parts, epochs=4, amp=amp)
        self.run(*parts, epochs=1, checkpoint=path, amp=amp)
        same(self.run(*parts, epochs=4, checkpoint=path, seed=9, amp=amp), whole)
        scaler = dict(_files.read(path)[1]["state"]["scaler"]["dict"])
        steps = 4 * 4  # that it has counted until its factor grows: those before the resume, too
        assert scaler.get("_growth_tracker") == (steps if amp == torch.float16 else None)
        with pytest.raises(ValueError, match=f"amp is None here, {amp} in the file"):
            self.run(*parts, epochs=5, checkpoint=path)

    def test_complete_run_only_gives_its_result(self, tmp_path):
        parts = sgd, SCHEDULERS["none"], 3, tmp_path / "run"
        first = self.run(*parts)
        before = (tmp_path / "run").read_bytes()
        same(self.run(*parts, seed=9), first)
        assert (tmp_path / "run").read_bytes() == before

    def test_global_random_state_orders_a_loader_without_generator(self, tmp_path):
        def run(epochs, checkpoint=None, seed=0):
            torch.manual_seed(seed)
            model = network()
            fit(
                model,
                DataLoader(samples(), 16, shuffle=True),
                epochs=epochs,
                optimizer=sgd(model.parameters()),
                checkpoint=checkpoint,
                progress=False,
            )
            return model.state_dict()

        run(2, tmp_path / "run")
        same(run(4, tmp_path / "run", seed=9), run(4))

    def test_resume_false_starts_anew(self, tmp_path):
        path = tmp_path / "run"
        for _ in range(2):
            torch.manual_seed(0)
            model = network()
            history = fit(
                model,
                batches(),
                epochs=2,
                optimizer=sgd(model.parameters()),
                checkpoint=path,
                resume=False,
                progress=False,
            )
            assert len(history) == 2
        assert len(_files.read(path)[1]["state"]["history"]["list"]) == 2

    def test_same_objects_continue(self, tmp_path):
        """A notebook's second cell: the schedulers stand where the checkpoint is."""
        torch.manual_seed(0)
        model, data = network(), batches()
        optimizer = adam(model.parameters())
        options = {
            "optimizer": optimizer,
            "scheduler": SCHEDULERS["warmup"](optimizer),
            "checkpoint": tmp_path / "run",
            "progress": False,
        }
        for epochs in (1, 3, 6):
            assert len(fit(model, data, epochs=epochs, **options)) == epochs

    def test_what_no_checkpoint_can_hold_is_refused_before_training(self, tmp_path):
        model = network()
        optimizer = sgd([{"params": model.parameters(), "name": same}])
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="cannot hold a function .*optimizers/0"):
            fit(model, batches(), epochs=1, optimizer=optimizer, checkpoint=tmp_path / "run")
        same(model.state_dict(), before)
        assert os.listdir(tmp_path) == []

    def test_fewer_epochs_than_are_done(self, tmp_path):
        path, parts = tmp_path / "run", (sgd, SCHEDULERS["none"])
        self.run(*parts, epochs=3, checkpoint=path)
        with pytest.raises(
            ValueError, match=f"{path} has 3 epochs done, more than epochs=1: ask for at least 3"
        ):
            self.run(*parts, epochs=1, checkpoint=path)

    def test_after_divergence_a_lower_rate_is_refused_until_started_anew(self, tmp_path):
        class Diverging(nn.Module):
            def forward(self, logits, targets):
                return nn.functional.cross_entropy(logits, targets) * criterion_factor

        def run(lr, **options):
            model = network()
            task = Supervised(model, Diverging())
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            options |= {"optimizer": optimizer, "progress": False}
            return fit(task, batches(), checkpoint=tmp_path / "run", **options)

        criterion_factor = 1.0
        run(0.2, epochs=1)
        criterion_factor = float("nan")
        with pytest.raises(
            FloatingPointError,
            match="lower the learning rate and name another checkpoint, or .* resume=False",
        ):
            run(0.2, epochs=2)
        criterion_factor = 1.0
        with pytest.raises(ValueError, match="SGD's lr is 1e-05 here, 0.2 in the file"):
            run(1e-5, epochs=2)
        assert len(run(1e-5, epochs=2, resume=False)) == 2


class TestKeepBest:
    def run(self, epochs, validations, checkpoint=None, keep_best=True):
        """Epoch i validates to `validations[i - 1]`, also when epochs before it were resumed."""
        torch.manual_seed(0)
        model, data = network(), batches()
        history = fit(
            model,
            data,
            epochs=epochs,
            optimizer=adam(model.parameters()),
            validate=lambda: next(validations),
            keep_best=keep_best,
            checkpoint=checkpoint,
            progress=False,
        )
        return model.state_dict(), history

    @pytest.mark.parametrize("validations", [[5, 3, 3, math.nan, 4], [math.nan, 3, 7, 8, 9]])
    def test_gives_the_first_of_the_lowest(self, validations):
        best, history = self.run(5, iter(validations))
        second, _ = self.run(2, iter(validations), keep_best=False)
        same(best, second)
        assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5]

    def test_without_a_number_it_is_the_last_epoch(self):
        last, _ = self.run(2, iter([math.nan] * 2))
        same(last, self.run(2, iter([1, 0]))[0])

    @pytest.mark.parametrize("interrupted_after", [1, 2, 4])
    def test_resumed_equals_uninterrupted(self, tmp_path, interrupted_after):
        validations, path = [5, 2, 3, 4, 6], tmp_path / "run"
        whole = self.run(5, iter(validations))
        self.run(interrupted_after, iter(validations), path)
        same(self.run(5, iter(validations[interrupted_after:]), path), whole)
        same(self.run(5, iter([]), path), whole)  # complete: only gives its result

    def test_a_run_that_did_not_keep_it_cannot_be_resumed(self, tmp_path):
        path = tmp_path / "run"
        self.run(1, iter([5]), path, keep_best=False)
        with pytest.raises(ValueError, match=f"{path} is .*another run .it was begun without keep"):
            self.run(2, iter([4]), path)
        self.run(2, iter([4]), path, keep_best=False)

    @pytest.mark.parametrize(
        "change",
        [
            lambda best: best.pop("task"),
            lambda best: best.update(validation="none"),
            lambda best: best["task"].popitem(),
            lambda best: best["task"].update({"model.0.weight": torch.ones(2)}),
        ],
    )
    def test_a_forged_one_is_refused_before_the_training(self, tmp_path, monkeypatch, change):
        path = tmp_path / "run"
        state = _checkpoint.Run._state

        def forged(run):
            changed = copy.deepcopy(state(run))
            if run.history:
                change(changed["best"])
            return changed

        with monkeypatch.context() as patch:
            patch.setattr(_checkpoint.Run, "_state", forged)
            self.run(1, iter([5]), path)
        with pytest.raises(ValueError, match=f"{path} is not a sound checkpoint"):
            self.run(2, iter([]), path)

    def test_needs_a_validation(self):
        model = network()
        with pytest.raises(ValueError, match="keep_best chooses by what validate returns"):
            fit(model, [], epochs=1, optimizer=sgd(model.parameters()), keep_best=True)


class TestCheckpointOfOtherSettings:
    """`settings` of a second call that differ from the first are never silently dropped."""

    def fit(self, path, make_optimizer, make_scheduler=None, epochs=2):
        model = network()
        optimizer = make_optimizer(model)
        fit(
            model,
            batches(),
            epochs=epochs,
            optimizer=optimizer,
            scheduler=make_scheduler and make_scheduler(optimizer),
            checkpoint=path,
            progress=False,
        )

    def refused(self, path, first, second, message):
        self.fit(path, *first)
        whole = path.read_bytes()
        with pytest.raises(ValueError, match=f"{path} is the checkpoint of another .*{message}"):
            self.fit(path, *second, epochs=4)
        assert path.read_bytes() == whole
        self.fit(path, *first, epochs=4)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"lr": 1e-5}, "SGD's lr is 1e-05 here, 0.1 in the file"),
            ({"momentum": 0.5}, "SGD's momentum is 0.5 here, 0.9 in the file"),
            ({"nesterov": True}, "SGD's nesterov is True here, False in the file"),
            ({"lr": torch.tensor(0.5)}, "SGD's lr is 0.5 here, 0.1 in the file"),
        ],
    )
    @pytest.mark.parametrize("schedule", SCHEDULERS)
    def test_of_an_optimizer(self, tmp_path, settings, message, schedule):
        def make(**changed):
            settings = {"lr": 0.1, "momentum": 0.9} | changed
            return lambda model: torch.optim.SGD(model.parameters(), **settings)

        scheduler = SCHEDULERS[schedule]
        self.refused(tmp_path / "run", (make(), scheduler), (make(**settings), scheduler), message)

    def test_of_adam_with_a_tensor_as_rate(self, tmp_path):
        def make(beta):
            return lambda model: torch.optim.Adam(
                model.parameters(), lr=torch.tensor(0.5), betas=(beta, 0.99)
            )

        message = r"Adam's betas is \[0.8, 0.99\] here, \[0.9, 0.99\] in the file"
        scheduler = SCHEDULERS["cosine"]
        self.refused(tmp_path / "run", (make(0.9), scheduler), (make(0.8), scheduler), message)

    def test_of_a_second_parameter_group(self, tmp_path):
        def make(lr):
            return lambda model: torch.optim.SGD(
                [{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": lr}],
                lr=0.1,
            )

        message = "SGD's param_groups/1/lr is 0.3 here, 0.2 in the file"
        self.refused(tmp_path / "run", (make(0.2),), (make(0.3),), message)

    @pytest.mark.parametrize(
        "first, second, message",
        [
            (
                lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2),
                lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
                "CosineAnnealingLR's T_max is 6 here, 2 in the file",
            ),
            (
                SCHEDULERS["multistep"],
                lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5),
                "MultiStepLR's milestones is .*4: 1.* here, .*3: 1.* in the file",
            ),
            (
                SCHEDULERS["warmup"],
                lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
                    optimizer,
                    [
                        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
                        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
                    ],
                    milestones=[2],
                ),
                "SequentialLR's _schedulers/1/gamma is 0.8 here, 0.9 in the file",
            ),
        ],
    )
    def test_of_a_scheduler(self, tmp_path, first, second, message):
        def make(model):
            return sgd(model.parameters())

        self.refused(tmp_path / "run", (make, first), (make, second), message)

    def test_that_the_file_does_not_hold(self, tmp_path):
        path = tmp_path / "run"
        self.fit(path, lambda model: sgd(model.parameters()))
        tensors, metadata = _files.read(path)
        del metadata["state"]["settings"]
        _files.write(path, tensors, metadata)
        with pytest.raises(ValueError, match="does not hold the settings of its optimizers"):
            self.fit(path, lambda model: sgd(model.parameters()))


class TestCheckpointOfSomethingElse:
    @pytest.fixture
    def path(self, tmp_path):
        path, model = tmp_path / "run.safetensors", network()
        options = {"optimizer": sgd(model.parameters()), "checkpoint": path, "progress": False}
        fit(model, batches(), epochs=1, **options)
        return path

    def resume(self, path, model, make_optimizer=sgd, data=None, scheduler=None):
        before = copy.deepcopy(model.state_dict())
        optimizer = make_optimizer(model.parameters())
        random = torch.get_rng_state()
        try:
            fit(
                model,
                data or batches(),
                epochs=2,
                optimizer=optimizer,
                scheduler=scheduler and scheduler(optimizer),
                checkpoint=path,
                progress=False,
            )
        finally:
            same(model.state_dict(), before)  # refused before anything was changed
            assert torch.equal(torch.get_rng_state(), random)

    @pytest.mark.parametrize(
        "model, message",
        [
            (nn.Sequential(*network(), nn.Linear(3, 3)), r"only this task has 'model.5.bias'"),
            (nn.Sequential(*network()[:4]), r"only the file has 'model.4.bias'"),
            (
                nn.Sequential(*network()[:4], nn.Linear(12, 4)),
                r"'model.4.weight' is float32\[4, 12\] here, float32\[3, 12\] in the file",
            ),
            (network().double(), r"'model.0.weight' is float64\[12, 6\] here, float32"),
        ],
    )
    def test_another_model(self, path, model, message):
        with pytest.raises(
            ValueError, match=f"{path} is the checkpoint of another run .*{message}"
        ):
            self.resume(path, model)

    def test_another_optimizer_or_scheduler(self, path):
        with pytest.raises(ValueError, match=r"with \['Adam'\] here, \['SGD'\] in the file"):
            self.resume(path, network(), adam)
        with pytest.raises(ValueError, match=r"\['SGD', 'MultiStepLR'\] here"):
            self.resume(path, network(), scheduler=SCHEDULERS["multistep"])
        with pytest.raises(ValueError, match="SGD has other parameter groups"):
            self.resume(path, network(), lambda parameters: sgd(list(parameters)[:2]))

    def test_data_that_had_no_generator(self, tmp_path):
        model, path = network(), tmp_path / "run"
        data = DataLoader(samples(), 16)
        fit(
            model,
            data,
            epochs=1,
            optimizer=sgd(model.parameters()),
            checkpoint=path,
            progress=False,
        )
        with pytest.raises(ValueError, match="data has a generator here"):
            self.resume(path, network())

    def test_other_files(self, path, tmp_path):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{path} is not a whole nncx file"):
            self.resume(path, network())
        _files.write(path, {}, {"kind": "model"})
        with pytest.raises(ValueError, match=f"{path} is not a checkpoint"):
            self.resume(path, network())

    @pytest.mark.parametrize(
        "forge",
        [
            lambda tensors, state: state.clear(),
            lambda tensors, state: state.pop("optimizers"),
            lambda tensors, state: state.update(history=7),
            lambda tensors, state: state.update(task={"dict": [[[], 0]]}),
            lambda tensors, state: state.update(types={"tensor": "absent"}),
            lambda tensors, state: state.update(types={"numpy": ["O", 1]}),
            lambda tensors, state: state["optimizers"]["list"].append(3),
            lambda tensors, state: tensors.update({"random/0/cpu": torch.zeros(3).byte()}),
            lambda tensors, state: tensors.update({"order": torch.zeros(3).byte()}),
        ],
        ids="empty optimizers history keys tensor numpy more cpu data".split(),
    )
    def test_forged_files(self, path, forge):
        """With a valid hash. The last two fail when everything else was taken already."""
        tensors, metadata = _files.read(path)
        forge(tensors, metadata["state"])
        _files.write(path, tensors, metadata)
        with pytest.raises(ValueError, match=f"{path} is not a sound checkpoint .*: name another"):
            self.resume(path, network())


class TestState:
    def test_round_trip_of_every_kind(self):
        state = {
            0: {"step": torch.tensor(3.0), "buffer": None, "empty": {}},
            "groups": [{"betas": (0.9, 0.999), "nesterov": True, "lr": 0.1 + 0.2}, []],
            "best": float("inf"),
            "milestones": Counter({3: 2}),
            "numpy": [np.float32(0.1), np.int64(3), np.bool_(True), np.float16("inf")],
        }
        tensors = {}
        restored = _checkpoint._from_json(_checkpoint._to_json(state, "state", tensors), tensors)
        same(restored, state)
        assert list(tensors) == ["state/0/step"]

    def test_what_no_state_may_hold(self):
        with pytest.raises(ValueError, match=r"cannot hold a function \(at 'state/0'\)"):
            _checkpoint._to_json([same], "state", {})
        with pytest.raises(ValueError, match="two tensors at 'x/a/b'"):
            _checkpoint._to_json({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "x", {})
