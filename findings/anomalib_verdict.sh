#!/usr/bin/env bash
# anomalib's F1AdaptiveThreshold is the score of an image: where a threshold separates good and
# defective images, it is the lowest defective score. PostProcessor then calls an image anomalous if
# its score is greater than the threshold, so this very image passes. On a set that can be separated
# without a mistake, the F1 of anomalib's own verdict is below 1, while F1Max, computed for the same
# scores, is 1.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
venv/bin/pip install -q anomalib==2.7.0
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import logging
from importlib.metadata import version

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import F1Max, F1Score
from anomalib.post_processing import PostProcessor

logging.disable(logging.CRITICAL)
print("anomalib", version("anomalib"), "torch", torch.__version__)
scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
labels = torch.arange(8) >= 4

def batch():
    return ImageBatch(image=torch.zeros(8, 3, 16, 16), gt_label=labels, pred_score=scores.clone(),
                      anomaly_map=scores.clone()[:, None, None].expand(8, 16, 16).clone())

processor = PostProcessor()
processor.on_validation_batch_end(None, None, batch())
processor.on_validation_epoch_end(None, None)
judged = batch()
processor.post_process_batch(judged)
best, verdict = F1Max(fields=["pred_score", "gt_label"]), F1Score(fields=["pred_label", "gt_label"])
best.update(batch())
verdict.update(judged)
print(f"threshold {float(processor.image_threshold):.2f}; verdicts "
      f"{judged.pred_label.int().tolist()}; F1 of the verdicts {float(verdict.compute()):.3f}, "
      f"F1Max {float(best.compute()):.3f}")
assert abs(float(verdict.compute()) - 6 / 7) < 1e-4 and float(best.compute()) > 0.999
EOF
