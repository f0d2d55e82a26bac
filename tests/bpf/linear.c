// SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only
// Looks at IPv4 TCP super-frames as they arrive: whether what can be read directly of them is still what the sender put there, the headers
// and nothing else. Loaded by tests/tests/lane_traffic.rs.
#include "helpers.h"

#define ETH_LEN 14
#define IPV4_LEN 20
#define TCP_LEN 20

// 0: super-frames; 1: those of which more can be read directly than the headers.
struct {
    UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, 2);
    TYPE(key, u32);
    TYPE(value, u64);
} super_frames SEC(".maps");

static inline __attribute__((always_inline)) void add(u32 which)
{
    u64 *n = map_lookup(&super_frames, &which);
    if (n)
        *n += 1;
}

SEC("classifier")
int linear(struct __sk_buff *ctx)
{
    unsigned char *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

    if (!ctx->gso_size || data + ETH_LEN + IPV4_LEN + TCP_LEN > end || data[12] != 0x08 || data[13] != 0x00)
        return -1;
    add(0);
    if (end - data > ETH_LEN + IPV4_LEN + (data[ETH_LEN + IPV4_LEN + 12] >> 4) * 4)
        add(1);
    return -1;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
