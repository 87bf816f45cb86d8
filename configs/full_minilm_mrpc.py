"""All weights of MiniLM-L6: MRPC of GLUE.

qalora train --config=configs/full_minilm_mrpc.py --workdir=runs/full_minilm_mrpc
qalora evaluate --workdir=runs/full_minilm_mrpc --tasks=mrpc --config.evaluate.data=glue

Minutes on two cores: about 12.  Expected: see experiments/results/glue.md.
"""

from configs import minilm


def get_config():
  return minilm.finetune('mrpc', 'full')
