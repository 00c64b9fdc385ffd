"""Calls functions of a built shim, without torch, which need not bear sanitizers: run_calls.py LIBRARY FOLDER."""

import importlib.util
import pickle
import sys
from pathlib import Path

library, folder = sys.argv[1], Path(sys.argv[2])
spec = importlib.util.spec_from_file_location("cuda_shim", library)
shim = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shim)
calls = pickle.loads((folder / "calls").read_bytes())
results = [getattr(shim, name)(*arguments) for name, arguments in calls]
(folder / "results").write_bytes(pickle.dumps(results))
