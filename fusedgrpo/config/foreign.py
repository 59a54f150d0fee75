"""Options that TRL, transformers or LLaMA-Factory have and this trainer has not.

Such a key is never ignored: it is refused by name with a remedy, unless its value asks for what
happens here anyway (mostly the peer's own default).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Refused(NamedTuple):
    """A peer's option that does not exist here. ``inert`` values of it change nothing."""

    remedy: str
    inert: tuple[Any, ...]

    def accepts(self, value: Any) -> bool:
        """Whether the value asks for nothing (types count: 1 is not true)."""
        return value is None or any(type(value) is type(v) and value == v for v in self.inert)


def _unset(keys: str) -> dict[str, None]:
    """Settings of a feature that does not exist: pointless unless left out."""
    return dict.fromkeys(keys.split())


# (remedy, {key: the value or the tuple of values that change nothing})
_GROUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "completions are sampled in this process, without a second engine: remove the vLLM, "
        "SGLang and paged-attention options",
        {
            "use_vllm": False,
            "vllm_mode": "colocate",
            "vllm_model_impl": "vllm",
            "vllm_enable_sleep_mode": False,
            "vllm_structured_outputs_regex": None,
            "vllm_server_base_url": None,
            "vllm_server_host": "0.0.0.0",
            "vllm_server_port": 8000,
            "vllm_server_timeout": 240.0,
            "vllm_group_port": 51216,
            "vllm_gpu_memory_utilization": 0.3,
            "vllm_max_model_length": None,
            "vllm_tensor_parallel_size": 1,
            "vllm_maxlen": 4096,
            "vllm_gpu_util": 0.7,
            "vllm_enforce_eager": False,
            "vllm_max_lora_rank": 32,
            "vllm_config": None,
            "sglang_maxlen": 4096,
            "sglang_mem_fraction": 0.7,
            "sglang_tp_size": -1,
            "sglang_config": None,
            "sglang_lora_backend": "triton",
            "infer_backend": ("huggingface", "hf"),
            "infer_dtype": "auto",
            "use_transformers_paged": False,
            "use_transformers_continuous_batching": False,
            "transformers_continuous_batching_config": None,
            "cache_implementation": None,
            "use_cache": False,
            "use_kv_cache": True,
        },
    ),
    (
        "sampler and trainer share one model here; sampler_correction and sampler_correction_cap "
        "correct what rounding leaves",
        {
            "vllm_importance_sampling_correction": (True, False),
            "vllm_importance_sampling_mode": "sequence_mask",
            "vllm_importance_sampling_clip_max": 3.0,
            "vllm_importance_sampling_clip_min": None,
            "vllm_importance_sampling_cap": None,
            "off_policy_mask_threshold": None,
        },
    ),
    (
        "use temperature, top_p, top_k, min_p and repetition_penalty",
        {
            "generation_kwargs": None,
            "do_sample": True,
            "num_beams": 1,
            "length_penalty": 1.0,
            "eval_num_beams": None,
        },
    ),
    (
        "not part of the loss here; entropy_coef is the fixed entropy bonus",
        {
            "top_entropy_quantile": 1.0,
            "use_adaptive_entropy": False,
            "entropy_coef_min": 0.0,
            "entropy_coef_max": 1.0,
            "entropy_coef_delta": 0.005,
            "entropy_target": 0.2,
            "label_smoothing_factor": 0.0,
            "neftune_noise_alpha": None,
            "average_tokens_across_devices": True,
        },
    ),
    (
        "the reference is the model without its adapter, or a frozen copy of it",
        {
            "sync_ref_model": False,
            "ref_model_mixup_alpha": 0.6,
            "ref_model_sync_steps": 512,
            "ref_model": None,
            "ref_model_adapters": None,
            "ref_model_quantization_bit": None,
        },
    ),
    (
        "name the reward model (a directory or a Hub id) in reward_funcs",
        {
            "reward_model": None,
            "reward_model_name_or_path": None,
            "reward_model_adapters": None,
            "reward_model_quantization_bit": None,
            "reward_model_type": "lora",
        },
    ),
    (
        "belongs to another training stage; this is GRPO",
        {
            "pref_ftx": 0.0,
            "pref_bco_weight": 0.0,
            "pref_loss": "sigmoid",
            "dpo_label_smoothing": 0.0,
            "kto_chosen_weight": 1.0,
            "kto_rejected_weight": 1.0,
            "simpo_gamma": 0.5,
            "ld_alpha": None,
            "ppo_buffer_size": 1,
            "ppo_epochs": 4,
            "ppo_score_norm": False,
            "ppo_target": 6.0,
            "ppo_whiten_rewards": False,
            "use_dft_loss": False,
            "use_asft_loss": False,
            "asft_alpha": 0.1,
            "use_eaft_loss": False,
            "eaft_alpha": 1.0,
            "compute_accuracy": False,
            "train_on_prompt": False,
            "mask_history": False,
            "ignore_pad_token_for_loss": True,
            "packing": (None, False),
            "neat_packing": False,
            "do_predict": False,
            "predict_with_generate": False,
            "prediction_loss_only": False,
            "label_names": None,
            "include_for_metrics": [],
            "batch_eval_metrics": False,
        },
    ),
    (
        "no tools, environments or turns after the first: completions are scored as they are",
        {
            "preserve_thinking": False,
            "max_tool_calling_iterations": None,
            "tool_format": None,
            "tools": None,
        },
    ),
    (
        "finetuning_type is lora or full",
        {
            "use_llama_pro": False,
            "freeze_trainable_layers": 2,
            "freeze_trainable_modules": "all",
            "freeze_extra_modules": None,
            "module_dropout": 0.0,
            "oft_rank": 0,
            "oft_block_size": 32,
            "oft_target": "all",
        },
    ),
    (
        "only plain and rank-stabilised LoRA on linear layers (lora_r, lora_alpha, lora_dropout, "
        "lora_target_modules, use_rslora) starting from zero",
        {
            "lora_target_parameters": None,
            "lora_modules_to_save": None,
            "additional_target": None,
            "lora_task_type": "CAUSAL_LM",
            "use_dora": False,
            "pissa_init": False,
            "pissa_iter": 16,
            "pissa_convert": False,
            "loraplus_lr_ratio": None,
            "loraplus_lr_embedding": 1e-6,
        },
    ),
    (
        "adapter_name_or_path is trained further: merge it into the model to train a new one, and "
        "name its folder directly",
        {"create_new_adapter": False, "adapter_folder": None},
    ),
    (
        "use load_in_4bit, bnb_4bit_quant_type and use_bnb_nested_quant",
        {
            "load_in_8bit": False,
            "bnb_4bit_quant_storage": None,
            "quantization_method": ("bnb", "bitsandbytes"),
            "quantization_device_map": None,
            "fp8": False,
            "fp8_backend": "auto",
            "fp8_enable_fsdp_float8_all_gather": False,
        },
    ),
    (
        "use dtype, bf16 and fp16; the adapter and the log-probabilities are float32",
        {
            "pure_bf16": False,
            "bf16_full_eval": False,
            "fp16_full_eval": False,
            "tf32": None,
            "upcast_layernorm": False,
            "upcast_lmhead_output": False,
            "cast_lm_head_to_fp32": False,
            "compute_dtype": None,
        },
    ),
    (
        "gradient_checkpointing is the only switch",
        {
            "gradient_checkpointing_kwargs": (None, {"use_reentrant": False}),
            "activation_checkpointing": None,
            "activation_checkpointing_kwargs": None,
            "use_reentrant_gc": False,
            "use_unsloth_gc": False,
        },
    ),
    (
        "the kernels of fusedgrpo are always on, others cannot be mixed in",
        {
            "use_liger_kernel": False,
            "liger_kernel_config": None,
            "enable_liger_kernel": False,
            "use_unsloth": False,
            "use_v1_kernels": (False, None),
            "torch_compile": False,
            "torch_compile_backend": None,
            "torch_compile_mode": None,
            "torch_empty_cache_steps": None,
            "use_kt": False,
            "use_liger_loss": False,
            "half_precision_backend": "auto",
            **_unset(
                "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
                "kt_lora_expert_intermediate_size"
            ),
        },
    ),
    (
        "set it in the model's own configuration, or through model_init_kwargs",
        {
            "rope_scaling": None,
            "shift_attn": False,
            "mixture_of_depths": None,
            "resize_vocab": False,
            "split_special_tokens": False,
            "add_tokens": None,
            "add_special_tokens": None,
            "new_special_tokens_config": None,
            "train_from_scratch": False,
            "use_fast_tokenizer": True,
            "low_cpu_mem_usage": True,
            "device_map": (None, "auto"),
            "model_max_length": None,
            "init_special_tokens": "noise_init",
            "offload_folder": "offload",
            "block_diag_attn": False,
        },
    ),
    (
        "set the environment variables HF_HOME and HF_TOKEN",
        {"cache_dir": None, "hf_hub_token": None, "ms_hub_token": None, "om_hub_token": None},
    ),
    (
        "text models only",
        {
            "media_dir": None,
            "freeze_vision_tower": True,
            "freeze_multi_modal_projector": True,
            "freeze_language_model": False,
            "image_max_pixels": 768 * 768,
            "image_min_pixels": 32 * 32,
            "video_max_pixels": 256 * 256,
            "video_min_pixels": 16 * 16,
            "video_fps": 2.0,
            "video_maxlen": 128,
            "image_do_pan_and_scan": False,
            "crop_to_patches": False,
            "use_audio_in_video": False,
            "audio_sampling_rate": 16000,
            "log_multimodal": (True, False),
        },
    ),
    (
        "save a subset with `Dataset.save_to_disk`, or register it in dataset_info.json with "
        "`subset` and `split`",
        {
            "dataset_config": None,
            "dataset_train_split": "train",
            "dataset_test_split": "test",
            "datasets": None,
            "tokenized_path": None,
            "mix_strategy": "concat",
            "interleave_probs": None,
            "eval_on_each_dataset": False,
        },
    ),
    (
        "prompts are read once, in this process, and never cached or streamed: remove it",
        {
            "streaming": False,
            "dataset_streaming": False,
            "buffer_size": 16384,
            # Nothing is cached, so every run does what `overwrite_cache: true` asks for.
            "overwrite_cache": (True, False),
            "preprocessing_batch_size": 1000,
            "preprocessing_num_workers": None,
            "dataset_num_proc": None,
            "data_shared_file_system": False,
            "dataloader_num_workers": 0,
            "dataloader_drop_last": False,
            "dataloader_pin_memory": True,
            "dataloader_persistent_workers": False,
            "dataloader_prefetch_factor": None,
            "dataloader_multiprocessing_context": None,
            "dataloader_in_order": True,
            "remove_unused_columns": False,
            "ignore_data_skip": False,
        },
    ),
    (
        "sequences are packed without padding, under tokens_per_microbatch",
        {
            "pad_to_multiple_of": ("auto", None),
            "auto_find_batch_size": False,
            "group_by_length": False,
            "train_sampling_strategy": "random",
            "length_column_name": "length",
        },
    ),
    (
        "every random choice derives from seed, and a run repeats bit by bit: remove it",
        {"data_seed": None, "full_determinism": (True, False)},
    ),
    (
        "optim names the optimizer; its settings are learning_rate, weight_decay, adam_beta1, "
        "adam_beta2 and adam_epsilon",
        {
            "optim_args": None,
            "optim_target_modules": None,
            "use_galore": False,
            "use_apollo": False,
            "use_badam": False,
            "use_adam_mini": False,
            "use_muon": False,
            **_unset(
                "galore_target galore_rank galore_update_interval galore_scale galore_proj_type "
                "galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale "
                "apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise "
                "apollo_scale_front badam_mode badam_start_block badam_switch_mode "
                "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose"
            ),
        },
    ),
    (
        "use lr_scheduler_type and warmup_steps",
        {"lr_scheduler_kwargs": None},
    ),
    (
        "accelerate launch starts several processes, and FusedGRPOTrainer shards weights",
        {
            "deepspeed": None,
            "fsdp": (None, "", []),
            "fsdp_config": None,
            "accelerator_config": None,
            "parallelism_config": None,
            "local_rank": -1,
            "ddp_find_unused_parameters": None,
            "ddp_bucket_cap_mb": None,
            "ddp_broadcast_buffers": None,
            "ddp_static_graph": None,
            "ddp_backend": None,
            "ddp_timeout": 1800,
            "ds3_gather_for_generation": True,
            "ray_num_workers": 1,
            "ray_init_kwargs": None,
            "master_addr": None,
            "master_port": None,
            "use_mca": False,
            "use_hyper_parallel": False,
            "hyper_parallel_args": None,
        },
    ),
    (
        "metrics.jsonl has every step; logging_steps sets how often one is shown",
        {
            "logging_strategy": "steps",
            "logging_first_step": (True, False),
            "logging_dir": None,
            "logging_nan_inf_filter": True,
            "log_on_each_node": True,
            "log_level": "passive",
            "log_level_replica": "warning",
            "disable_tqdm": (None, False),
            "include_num_input_tokens_seen": ("no", False),
            "include_tokens_per_second": (True, False),
            "include_effective_tokens_per_second": (True, False),
            "skip_memory_metrics": (True, False),
            "print_param_status": False,
            "debug": ("", []),
            "enable_torch_profiler": False,
            **_unset(
                "profiler_output_dir profiler_wait_steps profiler_warmup_steps "
                "profiler_active_steps profiler_repeat profiler_record_shapes "
                "profiler_profile_memory profiler_with_stack profile_modules"
            ),
        },
    ),
    (
        "plots are always written: remove it or set it to true",
        {"plot_loss": True},
    ),
    (
        "set report_to and run_name; the tracker reads its own environment variables",
        {
            "project": "huggingface",
            "trackio_space_id": None,
            "trackio_bucket_id": None,
            "trackio_static_space_id": None,
            "use_swanlab": False,
            "swanlab_project": "llamafactory",
            **_unset(
                "swanlab_run_name swanlab_workspace swanlab_mode swanlab_api_key swanlab_logdir "
                "swanlab_lark_webhook_url swanlab_lark_secret"
            ),
        },
    ),
    (
        "completions/*.jsonl has every completion; log_completions shows some",
        {"log_unique_prompts": False, "log_completions_hub_repo": None},
    ),
    (
        "evaluation: set eval_strategy, eval_steps, eval_dataset or val_size, "
        "per_device_eval_batch_size and num_generations_eval",
        {
            "do_eval": False,
            "eval_delay": 0,
            "eval_on_start": False,
            "eval_accumulation_steps": None,
            "eval_do_concat_batches": True,
            "eval_use_gather_object": False,
        },
    ),
    (
        "checkpoints are complete and every one is kept up to save_total_limit; choose one after "
        "the run",
        {
            "save_only_model": False,
            "save_on_each_node": False,
            "save_safetensors": True,
            # SIGTERM always saves before it exits.
            "enable_jit_checkpoint": (True, False),
            "load_best_model_at_end": False,
            "metric_for_best_model": None,
            "greater_is_better": None,
            "restore_callback_states_from_checkpoint": False,
            "early_stopping_steps": None,
        },
    ),
    (
        "nothing is uploaded: push the `adapter` folder yourself after the run",
        {
            "push_to_hub": False,
            "hub_token": None,
            "hub_private_repo": None,
            "hub_model_id": None,
            "hub_strategy": "every_save",
            "hub_always_push": False,
            "hub_revision": None,
        },
    ),
    (
        "merge or export the `adapter` folder with peft after the run",
        _unset(
            "export_dir export_size export_device export_quantization_bit export_legacy_format "
            "export_quantization_dataset export_quantization_nsamples "
            "export_quantization_maxlen export_hub_model_id"
        ),
    ),
    (
        "there is one process and no buffer to ignore: remove it",
        {"ignore_bias_buffers": False},
    ),
)

REFUSED: dict[str, Refused] = {
    key: Refused(remedy, inert if isinstance(inert, tuple) else (inert,))
    for remedy, keys in _GROUPS
    for key, inert in keys.items()
}
