#!/usr/bin/env bash
# torchmetrics takes scores outside [0, 1] for logits and applies a sigmoid, in float32 and without
# a warning. Anomaly scores that are distances (30 give or take 5) all become 1.0, and the AUROC
# falls to chance. The decision is made for each update() on its own, so scores that exceed 1 now
# and then are rescaled in some batches only, and the AUROC depends on the batch size.
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
labels = (torch.arange(400) >= 300).int()
distances = 30 + 5 * (torch.randn(400) + 1.6 * labels)
exact, found = roc_auc_score(labels, distances), BinaryAUROC()(distances, labels).item()
print(f"distances around 30: AUROC {found:.3f}, scikit-learn {exact:.3f}")
assert exact > 0.8 and abs(found - 0.5) < 0.02

scores = torch.cat([0.1 + 0.6 * torch.rand(300), 0.4 + 0.85 * torch.rand(100)])    # up to 1.25
order = torch.randperm(400)
scores, labels = scores[order], labels[order]
found = {}
for size in (400, 32, 8, 1):
    metric = BinaryAUROC()
    for s, label in zip(scores.split(size), labels.split(size)):
        metric.update(s, label)
    found[size] = metric.compute().item()
    print(f"scores up to 1.25 in batches of {size}: AUROC {found[size]:.3f}")
assert max(found.values()) - min(found.values()) > 0.02
EOF
