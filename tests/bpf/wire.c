// SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0-only
// The programs at the two ends of the packets-per-second benchmark: a generator, a counter, and what a data path
// is compared with. Loaded by tests/src/bench/wire.rs.
#include "helpers.h"

static u32 (*const random_u32)(void) = (void *)BPF_FUNC_get_prandom_u32;

#define ETH_LEN 14
#define SOURCE (ETH_LEN + 12)
#define PORTS (ETH_LEN + 20)
#define URGENT (ETH_LEN + 20 + 18)
#define HEADERS 54

// Ethernet, IPv4 and TCP headers of every frame, but for what tells flows apart. Set before loading.
const volatile unsigned char template[HEADERS];
// Number of flows. Set before loading.
const volatile u32 flows;

struct {
    UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, u32);
    TYPE(value, u64);
} counted SEC(".maps");

// Flows differ in the source port and, beyond 32768 of them, in the lower half of the source address. The IP
// identification and the TCP urgent pointer take up the differences, so that both checksums of the template stay right.
SEC("xdp")
int generate(struct xdp_md *ctx)
{
    unsigned char *data = (void *)(long)ctx->data;
    unsigned char *end = (void *)(long)ctx->data_end;
    u32 flow;
    u16 port, address, both;
    u32 sum;

    if (data + HEADERS > end)
        return XDP_ABORTED;
#pragma unroll
    for (int i = 0; i < HEADERS; i++)
        data[i] = template[i];
    flow = flows > 1 ? random_u32() % flows : 0;
    port = 1024 + (flow & 0x7fff);
    address = 1 + (flow >> 15);
    data[ETH_LEN + 4] = ~(address >> 8);
    data[ETH_LEN + 5] = ~address;
    data[SOURCE + 2] = address >> 8;
    data[SOURCE + 3] = address;
    data[PORTS] = port >> 8;
    data[PORTS + 1] = port;
    sum = (u32)port + address;
    both = ~(u16)((sum & 0xffff) + (sum >> 16));
    data[URGENT] = both >> 8;
    data[URGENT + 1] = both;
    return XDP_TX;
}

SEC("xdp")
int count(struct xdp_md *ctx)
{
    u32 zero = 0;
    u64 *n = map_lookup(&counted, &zero);

    (void)ctx;
    if (n)
        *n += 1;
    return XDP_DROP;
}

// The least that a balancer in the driver can do: change the MAC addresses and send.
SEC("xdp")
int reflect(struct xdp_md *ctx)
{
    unsigned char *data = (void *)(long)ctx->data;
    unsigned char *end = (void *)(long)ctx->data_end;
    unsigned char mac[6];

    if (data + ETH_LEN > end)
        return XDP_ABORTED;
    __builtin_memcpy(mac, data, 6);
    __builtin_memcpy(data, data + 6, 6);
    __builtin_memcpy(data + 6, mac, 6);
    return XDP_TX;
}

// On interfaces whose data path is further up: without it a veth takes no frames from the generator.
SEC("xdp")
int pass(struct xdp_md *ctx)
{
    (void)ctx;
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
