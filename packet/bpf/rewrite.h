/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * Gives a packet its new ends and one hop less, in place, the checksums with them.
 *
 * At XDP every checksum is whole. At tc the L4 checksum may be partial, or the device may have summed the packet: the kernel's
 * helper knows which, and the rest is written directly.
 */
#ifndef KOMAINU_REWRITE_H
#define KOMAINU_REWRITE_H

#include "parse.h"

/* An end of a packet as it is to be: `address` null: it stays. */
struct end {
    const u32 *address;
    u16 port;
};

/* Writes `address` at `at` and says what that does to a sum. */
INLINE u64 put_address(u8 *at, int v6, const u32 *address)
{
    u64 delta = 0;
    if (!v6) {
        delta = delta32(*(u32 *)at, address[3]);
        *(u32 *)at = address[3];
        return delta;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        delta += delta32(*(u32 *)(at + 4 * i), address[i]);
        *(u32 *)(at + 4 * i) = address[i];
    }
    return delta;
}

INLINE u64 put_port(u16 *at, u16 port)
{
    u64 delta = delta16(*at, port);
    *at = port;
    return delta;
}

INLINE void put_macs(u8 *eth, u64 dst, u64 src)
{
    *(u32 *)eth = (u32)dst;
    *(u16 *)(eth + 4) = (u16)(dst >> 32);
    *(u32 *)(eth + 6) = (u32)src;
    *(u16 *)(eth + 10) = (u16)(src >> 32);
}

/* Only the MACs: `dsr`. Returns 0 when the frame is not there any more. */
INLINE int rewrite_macs(context *ctx, u64 dst, u64 src)
{
    u8 *data = (void *)(long)ctx->data;
    if ((void *)(data + ETH_LEN) > (void *)(long)ctx->data_end)
        return 0;
    put_macs(data, dst, src);
    return 1;
}

/* Everything: the NAT modes. `l4` is the length of the L4 header's fixed part. */
INLINE int rewrite_ends(context *ctx, int v6, int tcp, struct end src, struct end dst, u64 dst_mac, u64 src_mac)
{
    u8 *data = (void *)(long)ctx->data;
    const int l4_at = ETH_LEN + (v6 ? IPV6_LEN : IPV4_LEN);
    if ((void *)(data + l4_at + (tcp ? TCP_LEN : UDP_LEN)) > (void *)(long)ctx->data_end)
        return 0;
    put_macs(data, dst_mac, src_mac);
    u8 *ip = data + ETH_LEN, *l4 = data + l4_at;
    u64 pseudo = 0, body = 0;
    if (src.address) {
        pseudo += put_address(ip + (v6 ? 8 : 12), v6, src.address);
        body += put_port((u16 *)l4, src.port);
    }
    if (dst.address) {
        pseudo += put_address(ip + (v6 ? 24 : 16), v6, dst.address);
        body += put_port((u16 *)(l4 + 2), dst.port);
    }
    /* TTL with the protocol beside it, hop limit with the next header. */
    u16 *hops = (u16 *)(ip + (v6 ? 6 : 8));
    u16 before = *hops;
    if (v6)
        ip[7]--;
    else
        ip[8]--;
    u64 hop = delta16(before, *hops);
    if (!v6)
        *(u16 *)(ip + 10) = delta_apply(*(u16 *)(ip + 10), pseudo + hop);
#ifdef KOMAINU_XDP
    u16 *sum = (u16 *)(l4 + (tcp ? 16 : 6));
    if (tcp) {
        *sum = delta_apply(*sum, pseudo + body);
    } else if (*sum) {
        /* 0 says that there is none, so a computed 0 is sent as its other form (RFC 768). */
        u16 new = delta_apply(*sum, pseudo + body);
        *sum = new ? new : 0xffff;
    }
#else
    const u32 at = l4_at + (tcp ? 16 : 6);
    const u64 udp = tcp ? 0 : BPF_F_MARK_MANGLED_0;
    u32 pseudo32 = sum_fold(pseudo), body32 = sum_fold(body);
    if (l4_csum_replace(ctx, at, 0, pseudo32, BPF_F_PSEUDO_HDR | udp))
        return 0;
    if (l4_csum_replace(ctx, at, 0, body32, udp))
        return 0;
    /* A sum over the whole packet, where the device gave one: in IPv4 the header's own checksum makes up for what changed in the
     * header, and the helper accounts for the pseudo-header; IPv6 has none, so here both changes cancel out, but for the hop. */
    if (v6)
        csum_update(ctx, sum_fold((u64)pseudo32 + hop));
#endif
    return 1;
}

#endif
