"""What stands in both method files stands there to the letter, so that a reader of one knows that part of the other."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = {  # the method's
    "Inference", "anomaly_map", "image_score", "train", "judge", "evaluate", "build_backbone", "build", "bench",
    "paper_figures", "parse"}


def functions(name):
    text = (ROOT / name).read_text()
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if hasattr(node, "name")}


def test_functions_of_the_same_name_are_the_same():
    a, b = functions("mintad.py"), functions("minimaxad.py")
    shared = [name for name in a if name in b and name not in OWN]
    assert len(shared) > 20
    assert [name for name in shared if a[name] != b[name]] == []
    around = [name for name in shared if list(a).index(name) > list(a).index("train_run")]
    assert around == [name for name in b if name in around]  # and in the same order
    assert OWN <= a.keys() & b.keys()
