#!/usr/bin/env bash
# The embedded default, without GPU or network: answer a prompt, train, evaluate, answer it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
base=models/chatglm2-tiny
output_dir=saved_files/demo_chatglm2_tiny
query='类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套'

echo "== before training"
python tools/ask.py --model_name_or_path "$base" --query "$query"

rm -rf "$output_dir"
echo "== training"
python train_qlora.py --model_name_or_path "$base" --train_args_json tools/demo_train_args.json \
    --train_data_path data/train.jsonl --eval_data_path data/dev.jsonl --lora_rank 4

echo "== after training"
python tools/ask.py --model_name_or_path "$base" --lora_path "$output_dir" --query "$query"
