"""Wrong calls of the command line: one line that says what is required and what was found, exit code 2, and nothing written.

Wrong calls of the library are in test_bad_input.py.
"""
from __future__ import annotations

from pathlib import Path

import pytest

from demp_kernels.cli import main

FILES = {
    "file": "", "list.json": "[1]", "broken.json": "{", "unknown.json": '{"colour": 1}', "type.json": '{"epochs": "many"}',
    "rows/rows.csv": "a,b\n1,2\n", "checks/selfcheck.json": "{",
}
"""What lies in the folder that the commands are called in, beside the folder `empty`."""
BAD = [
    ("train --model resnet19", "model must be one of"),
    ("train --data mnist", "data must be one of digits, fashion-mnist, cifar10, folder, got 'mnist'"),
    ("train --data fashion-mnist --data-dir nowhere", "data-dir must be an existing folder, got nowhere"),
    ("train --data fashion-mnist --data-dir .", "is not a Fashion-MNIST folder"),
    ("train --data cifar10 --data-dir .", "is not a CIFAR-10 folder"),
    ("train --lr -0.1", "lr must be above 0 and finite, got -0.1"),
    ("train --lr nan", "lr must be above 0 and finite, got nan"),
    ("train --lr fast", "argument --lr: invalid float value: 'fast'"),
    ("train --peak-penalty -1", "peak-penalty must be at least 0 and finite, got -1.0"),
    ("train --peak-noise -1", "peak-noise must be at least 0 and finite, got -1.0"),
    ("train --weight-decay inf", "weight-decay must be at least 0 and finite, got inf"),
    ("train --epochs 0", "epochs must be at least 1, got 0"),
    ("train --batch-size 0", "batch-size must be at least 1, got 0"),
    ("train --batch-size 5000", "batch-size must be at most the number of training images, 1437, got 5000"),
    ("train --prune-every 0", "prune-every must be at least 1, got 0"),
    ("train --criterion magic", "argument --criterion: invalid choice: 'magic'"),
    ("train --device quantum", "device must be auto, cpu, cuda or cuda:N, got 'quantum'"),
    ("train --device cuda:99", "device cuda:99 is not there"),
    ("train --threads 0", "threads must be at least 1, got 0"),
    ("train --accumulate 0", "accumulate must be at least 1, got 0"),
    ("train --accumulate 3", "batch-size must be a multiple of processes times accumulate, 1 x 3, got 64"),
    ("train --sync-batchnorm --device cpu", "sync-batchnorm needs CUDA devices, as torch's SyncBatchNorm does, got device cpu"),
    ("train --amp fp16 --device cpu", "amp fp16 needs a CUDA device"),
    ("train --model alexnet --epochs 1", "alexnet does not take images of 3x16x16; image-size resizes"),
    ("train --seeds 1", "unrecognized arguments: --seeds 1"),
    ("train --out file", "out must be a folder, got the file file"),
    ("train --out file/below", "out cannot be made: file/below"),
    ("train --recipe nowhere", "recipe must be a .json file or one of"),
    ("train --recipe list.json", "recipe must be a JSON object of settings, got list in list.json"),
    ("train --recipe broken.json", "recipe cannot be read: broken.json"),
    ("train --recipe unknown.json", "recipe has an unknown setting 'colour'"),
    ("train --recipe type.json", "recipe setting epochs must be int | None, got 'many'"),
    ("train --recipe empty", "recipe must be"),
    ("train --width 0", "width must be at least 1, got 0"),
    ("train --width 2.5", "argument --width: invalid int value: '2.5'"),
    ("train --image-size 0", "image-size must be at least 1, got 0"),
    ("train --train-size 0", "train-size must be at least 1, got 0"),
    ("train --workers -1", "workers must be at least 0 and finite, got -1"),
    ("train --epochs 1e3", "argument --epochs: invalid int value: '1e3'"),
    ("train --optimizer lion", "argument --optimizer: invalid choice: 'lion'"),
    ("train --lr 0", "lr must be above 0 and finite, got 0.0"),
    ("train --lr inf", "lr must be above 0 and finite, got inf"),
    ("train --momentum 1", "momentum must be at least 0 and below 1, got 1.0"),
    ("train --momentum -0.1", "momentum must be at least 0 and below 1, got -0.1"),
    ("train --weight-decay -1", "weight-decay must be at least 0 and finite, got -1.0"),
    ("train --label-smoothing 1", "label-smoothing must be at least 0 and below 1, got 1.0"),
    ("train --label-smoothing nan", "label-smoothing must be at least 0 and below 1, got nan"),
    ("train --lr-schedule cosine", "argument --lr-schedule: invalid choice: 'cosine'"),
    ("train --lr-schedule steps", "lr-drops go with lr-schedule steps, got steps and []"),
    ("train --lr-drops 3", "lr-drops go with lr-schedule steps, got one-cycle and [3]"),
    ("train --lr-schedule steps --lr-drops 0", "lr-drops must be epochs of at least 1, got 0"),
    ("train --lr-factor 0", "lr-factor must be above 0 and at most 1, got 0.0"),
    ("train --lr-factor 2", "lr-factor must be above 0 and at most 1, got 2.0"),
    ("train --warm-up 1", "warm-up must be at least 0 and below 1, got 1.0"),
    ("train --seed -1", "seed must be at least 0 and finite, got -1"),
    ("train --seed 9223372036854775808", "seed must be below 2^63, got 9223372036854775808"),
    ("train --seed x", "argument --seed: invalid int value: 'x'"),
    ("train --peak-penalty nan", "peak-penalty must be at least 0 and finite, got nan"),
    ("train --penalty-on colours", "argument --penalty-on: invalid choice: 'colours'"),
    ("train --target-flops 0", "target-flops must be above 0 and below 1, got 0.0"),
    ("train --target-flops 1", "target-flops must be above 0 and below 1, got 1.0"),
    ("train --target-flops nan", "target-flops must be above 0 and below 1, got nan"),
    ("train --target-flops 0.2 --target-sparsity 0.5", "target-flops and target-sparsity exclude each other, got both"),
    ("train --target-sparsity 1.5", "target-sparsity must be above 0 and below 1, got 1.5"),
    ("train --steer-until 0", "steer-start and steer-until must be 0 <= start < until <= 1, got 0.05 and 0"),
    ("train --steer-until 2", "steer-start and steer-until must be 0 <= start < until <= 1, got 0.05 and 2"),
    ("train --steer-start 0.3", "steer-start and steer-until must be 0 <= start < until <= 1, got 0.3 and 0.3"),
    ("train --steer-start -1", "steer-start and steer-until must be 0 <= start < until <= 1, got -1 and 0.3"),
    ("train --push-rate 0", "push-rate must be above 0 and below 1, got 0.0"),
    ("train --push-rate 1", "push-rate must be above 0 and below 1, got 1.0"),
    ("train --ramp 0", "ramp must be above 0 and at most 1, got 0.0"),
    ("train --ramp 1.5", "ramp must be above 0 and at most 1, got 1.5"),
    ("train --peak-noise inf", "peak-noise must be at least 0 and finite, got inf"),
    ("train --round-to 0", "round-to must be at least 1, got 0"),
    ("train --round-to auto", "argument --round-to: invalid int value: 'auto'"),
    ("train --policy never", "argument --policy: invalid choice: 'never'"),
    ("train --threads x", "argument --threads: invalid int value: 'x'"),
    ("train --amp int8", "argument --amp: invalid choice: 'int8'"),
    ("train --evaluate-every 0", "evaluate-every must be at least 1, got 0"),
    ("train --save-every 0", "save-every must be at least 1, got 0"),
    ("train --device mps", "device must be auto, cpu, cuda or cuda:N, got 'mps'"),
    ("train --device", "argument --device: expected one argument"),
    ("train --data folder", "data-dir is required for data 'folder', got none"),
    ("train --data folder --data-dir empty", "empty"),
    ("train --data folder --data-dir file", "data-dir must be an existing folder, got file"),
    ("train --out", "argument --out: expected one argument"),
    ("train --epoch 3", "unrecognized arguments: --epoch 3"),
    ("train extra", "unrecognized arguments: extra"),
    ("compare --methods magic", "methods must be of dense, demp"),
    ("compare --methods", "argument --methods: expected at least one argument"),
    ("compare --methods dense dense", "methods must be different ones, got dense dense"),
    ("compare --methods snap", "sparsity is required"),
    ("compare --target-flops 0.2", "target-flops is of the method demp-fast: methods must have it, got dense demp"),
    ("compare --methods dense demp --target-sparsity 0.9", "target-sparsity is of the method demp-fast"),
    ("compare --dense-lr 0", "dense-lr must be above 0 and finite, got 0.0"),
    ("compare --seeds 0", "seeds must be at least 1, got 0"),
    ("compare --seeds x", "argument --seeds: invalid int value: 'x'"),
    ("compare --seed 3", "unrecognized arguments: --seed 3"),
    ("compare --resume", "unrecognized arguments: --resume"),
    ("compare --sparsity 1", "sparsity must"),
    ("compare --sparsity 0", "sparsity must"),
    ("compare --sparsity nan", "sparsity must"),
    ("compare --peak-penalty -1", "peak-penalty must"),
    ("compare --out file", "out must be a folder, got the file file"),
    ("coverage resnet19", "model must be one of torchvision's, segmentation/..., backbone/..._fpn or timm/..., got 'resnet19'"),
    ("coverage nothing/resnet18", "got 'nothing/resnet18'"),
    ("coverage --out", "argument --out: expected one argument"),
    ("coverage resnet18 --out file", "out must be a folder, got the file file"),
    ("bench nothing", "what must be among activation,"),
    ("bench --threads 0", "threads must be whole numbers above 0 separated by commas, got '0'"),
    ("bench --threads x", "threads must be whole numbers above 0 separated by commas, got 'x'"),
    ("bench --seconds 0", "seconds must be above 0 and finite, got 0.0"),
    ("bench --seconds nan", "seconds must be above 0 and finite, got nan"),
    ("bench --seconds x", "argument --seconds: invalid float value: 'x'"),
    ("bench step --widths 0", "widths must be at least 1, got 0"),
    ("bench --device quantum", "device must be auto, cpu, cuda or cuda:N, got 'quantum'"),
    ("bench --device cuda:99", "device cuda:99 is not there"),
    ("bench report --out nowhere", "report needs rows in nowhere/rows.csv, found none"),
    ("bench report --out rows", "rows.csv"),
    ("bench activation --out file", "out must be a folder, got the file file"),
    ("selfcheck nothing", "check must be one of kills, wrong-calls,"),
    ("selfcheck --minutes 0", "--minutes must be a number above 0, got 0.0"),
    ("selfcheck --minutes nan", "--minutes must be a number above 0, got nan"),
    ("selfcheck --minutes x", "argument --minutes: invalid float value: 'x'"),
    ("selfcheck --readme file", "--readme needs --out"),
    ("selfcheck files --readme file --out empty", "readme: file must have the lines"),
    ("selfcheck files --out checks", "selfcheck.json is no file of demp selfcheck"),
    ("selfcheck files --out file", "out must be a folder, got the file file"),
    ("info extra", "unrecognized arguments: extra"),
    ("info --kernel", "unrecognized arguments: --kernel"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[call for call, _ in BAD])
def test_bad_input_is_one_line_and_code_2(
    call: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(call.split())
    except SystemExit as stopped:  # argparse's own way out
        code = stopped.code
    output = capsys.readouterr()
    assert code == 2
    assert output.err.startswith(f"demp {call.split()[0]}: error: ") and output.err.count("\n") == 1, output.err
    assert text in output.err
    assert output.out == ""
    changed = [path for path in sorted(tmp_path.rglob("*")) if path not in before or (path.is_file() and path.read_text() != FILES[str(path.relative_to(tmp_path))])]
    assert not [path for path in changed if path.name != "demp-run"], changed


@pytest.mark.parametrize("call", ["nothing", "--nothing", ""])
def test_no_command(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(call.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("demp: error: ")
