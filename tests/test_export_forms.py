"""Tables and results of an earlier export form predict nothing any more."""

import re
from pathlib import Path

import onnx
import pytest

from nas.export_forms import current_form
from nas.lookup import Place, places, usable_table
from nas.lut import import_medians, table_to_extend
from nas.profile import print_profile
from nas.profilers.ort_cpu import OrtCpu
from nas.show import print_tables, show_table
from nas.table import LatencyTable, Target
from supernet.errors import InputError
from supernet.space import SearchSpace
from supernet.specs import MB4D, Layer

OLD = {  # forms of tables that were measured before: mostly before there was a deploy form
    "onnxruntime fp32": "torchscript, opset 20, plain form",
    "onnxruntime int8": "torchscript, opset 20, plain form, static QDQ per channel",
    "coreml fp16": "mlprogram, iOS 16, fp16 in and out",
    "torch inductor, CUDA graphs fp16": "deploy form, torch.compile (default mode, one graph), channels-last, TF32 off",
}


@pytest.mark.parametrize("kind", OLD)
def test_a_table_of_an_earlier_form_is_only_shown_or_replaced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.table.user_folder", lambda: tmp_path / "tables")
    runtime, _, precision = kind.rpartition(" ")
    settings = {"runtime": runtime, "precision": precision, "runtime_version": "1", "threads": 1, "batch": 1}
    now = {**settings, "export": current_form(settings)}
    assert ("plain form" if "CUDA" in kind else "deploy form") in str(now["export"])
    path = LatencyTable("board-cpu", {}, meta=now).save("latency_tables")
    assert LatencyTable.load(path).meta["export"] == now["export"]
    LatencyTable("board-cpu", {}, meta={**settings, "export": OLD[kind]}).save("latency_tables")
    anew = "build it anew: `nas-build-lut --device board-cpu --space SPACE --out latency_tables`"
    said = re.escape(f"another export form ({OLD[kind]}; now {now['export']}): {anew}")
    for refused in (
        lambda: LatencyTable.load(path),
        lambda: print_profile("efficientformer_l1", "board-cpu", layers=False, as_json=False),
        lambda: places([("board-cpu", 1.0), ("cpu", 1.0)], [path]),
        lambda: usable_table(Place(Target(1.0), "board-cpu", path, named=True), SearchSpace.load("efficientformer-tiny"), "s"),
        lambda: import_medians(tmp_path / "medians.csv", None, "board-cpu"),
    ):
        with pytest.raises(InputError, match=said):
            refused()
    with pytest.raises(InputError, match="without --missing"):
        table_to_extend(path, now, only_missing=True)
    assert table_to_extend(path, now, only_missing=False) is None
    print_tables()
    show_table("board-cpu", tmp_path)
    shown = capsys.readouterr()
    assert "board-cpu: 0 rows" in shown.out and "unusable" not in shown.out
    assert f"export {OLD[kind]}: this build replaces it" in shown.err


def test_a_table_of_this_machine_is_of_the_deploy_form() -> None:
    nodes = onnx.load_from_string(OrtCpu().onnx((Layer(MB4D(16), 8),))).graph.node
    assert not any(node.op_type == "Sub" for node in nodes)
