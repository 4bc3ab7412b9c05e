#!/usr/bin/env bash
# torchmetrics with thresholds=200, which its documentation recommends for much data, loses more
# than precision. (1) The thresholds are evenly spaced in [0, 1]: on maps whose pixels are nearly
# all close to 0, most pixels share one bin. (2) The binned ROC curve does not begin at (0, 0) where
# scores reach 1.0: the area up to its first point is missing, so maps that are 0 or 1 (binary
# masks) have a lower AUROC, although 200 thresholds are plenty for two values.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 torchmetrics==1.9.0 scikit-learn==1.9.1 numpy==2.4.6
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import sklearn
import torch
import torchmetrics
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import BinaryAUROC

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__, "scikit-learn",
      sklearn.__version__)
torch.manual_seed(0)
truth = (torch.rand(100_000) < 0.1).int()
skewed = torch.sigmoid(torch.randn(100_000) * 1.5 + 2.5 * truth - 9.5)     # 98 % below 0.005
binary = torch.where(truth == 1, torch.rand(100_000) < 0.8, torch.rand(100_000) < 0.3).float()
lost = {}
for name, maps in (("maps close to 0", skewed), ("binary maps", binary)):
    exact, full, bins = (roc_auc_score(truth, maps), BinaryAUROC()(maps, truth).item(),
                         BinaryAUROC(thresholds=200)(maps, truth).item())
    lost[name] = exact - bins
    print(f"{name}: scikit-learn {exact:.3f}, thresholds=None {full:.3f}, thresholds=200 "
          f"{bins:.3f}")
    assert abs(exact - full) < 1e-5
assert lost["maps close to 0"] > 0.2 and lost["binary maps"] > 0.1
EOF
