#!/bin/bash
# caches and training of a 1.3B LoRA
MODELS=/models/wan
python src/musubi_tuner/wan_cache_latents.py --dataset_config dataset_videos.toml --vae $MODELS/wan_2.1_vae.safetensors --skip_existing
python src/musubi_tuner/wan_cache_text_encoder_outputs.py --dataset_config dataset_videos.toml \
  --t5 $MODELS/models_t5_umt5-xxl-enc-bf16.pth --batch_size 16 --fp8_t5

accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/wan_train_network.py \
    --task t2v-1.3B \
    --dit "${MODELS}/wan2.1_t2v_1.3B_bf16.safetensors" \
    --dataset_config dataset_videos.toml --sdpa --mixed_precision bf16 --fp8_base \
    --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing \
    --max_data_loader_n_workers 2 --persistent_data_loader_workers \
    --network_module networks.lora_wan --network_dim 32 \
    --network_args "loraplus_lr_ratio=4" "exclude_patterns=[r'blocks\.0\..*']" \
    --timestep_sampling shift --discrete_flow_shift 3.0 \
    --max_train_steps 1000 --lr_scheduler cosine --lr_warmup_steps 0.1 \
    --save_every_n_steps 250 --seed 7 --sample_prompts prompts.txt --sample_every_n_steps 250 \
    --output_dir runs --output_name fish
