#!/usr/bin/env bash
# The included tiny models, without GPU or network: answer a prompt, train, answer again, merge, chat; then
# the report: what the training changed on examples that it did not see, and on general questions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # matrices this small run faster on one thread than on two
query='类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套'

for name in chatglm2-tiny chatglm-tiny; do
    base=models/$name
    output_dir=saved_files/demo_$name
    mkdir -p saved_files
    sed "s#OUTPUT_DIR#$output_dir#" tools/demo_train_args.json > saved_files/demo_train_args.json

    echo "== $name before training"
    python chat_demo.py --model_path "$base" --temperature 0 --max_length 512 --prompt "$query"

    rm -rf "$output_dir"
    echo "== $name training"
    python train_qlora.py --model_name_or_path "$base" --train_args_json saved_files/demo_train_args.json \
        --train_data_path data/train.jsonl --eval_data_path data/dev.jsonl --lora_rank 4

    echo "== $name after training"
    python chat_demo.py --lora_path "$output_dir" --temperature 0 --max_length 512 --prompt "$query"

    for qbits in 0 8 4; do
        echo "== $name merged, qbits $qbits"
        rm -rf "${output_dir}_q$qbits"
        python merge_lora_and_quantize.py --lora_path "$output_dir" --output_path "${output_dir}_q$qbits" --qbits $qbits
        python chat_demo.py --model_path "${output_dir}_q$qbits" --temperature 0 --max_length 512 --prompt "$query"
    done
done

echo "== speed of the merged models and their bases"
python inference_test.py --model_path models/chatglm-tiny,saved_files/demo_chatglm-tiny_q0,saved_files/demo_chatglm-tiny_q4,models/chatglm2-tiny,saved_files/demo_chatglm2-tiny_q0,saved_files/demo_chatglm2-tiny_q4 \
    --new_tokens 32 --loop_number 3 --output_json saved_files/demo_inference.json | grep '^|'  # its last line is the file

echo "== chat"
python chat_demo.py --model_path saved_files/demo_chatglm2-tiny_q4 --seed 1 --prompt "$query"

for name in chatglm2-tiny chatglm-tiny; do
    adapter=saved_files/demo_$name
    echo "== $name: did it help?"
    python evaluate_adapter.py --lora_path "$adapter" --data_path data/dev.jsonl --num_samples 100 --max_new_tokens 160 \
        --probe false --output_dir "${adapter}_evaluation"
    echo "== $name: did it forget? (general questions of the kinds that the tiny models were pretrained on)"
    python evaluate_adapter.py --lora_path "$adapter" --data_path data/probe_tiny.jsonl --num_samples 160 \
        --max_new_tokens 64 --probe false --output_dir "${adapter}_forgetting"
done
