/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
#include "helpers.h"

SEC("xdp")
int floor_tx(struct xdp_md *ctx)
{
    (void)ctx;
    return XDP_TX;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
