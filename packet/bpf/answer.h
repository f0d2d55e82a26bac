/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/* ARP and neighbour discovery for addresses of the plan, under the lease: `src/engine/arp_nd.rs`. */
#ifndef KOMAINU_ANSWER_H
#define KOMAINU_ANSWER_H

#include "rewrite.h"
#include "select.h"

#define ARP_FRAME (ETH_LEN + 28)
/* A solicitation or advertisement with one address option. */
#define ND_LEN 32
#define ND_FRAME (ETH_LEN + IPV6_LEN + ND_LEN)

#define ND_SOLICITATION 135
#define ND_ADVERTISEMENT 136

INLINE u64 mac_at(const u8 *at)
{
    return *(const u32 *)at | (u64) * (const u16 *)(at + 4) << 32;
}

INLINE int is_unicast(u64 mac)
{
    return mac && !(mac & 1);
}

INLINE int is_own_mac(const struct config *c, u64 mac)
{
    return mac == (c->ports[0].mac & HOP_MAC) || (c->ports[1].mac && mac == (c->ports[1].mac & HOP_MAC));
}

/* Cuts off padding: an answer is as long as what it says. */
INLINE int trim(context *ctx, u32 len)
{
    u32 now = frame_len(ctx);
    if (now <= len)
        return 0;
#ifdef KOMAINU_XDP
    return xdp_adjust_tail(ctx, (int)len - (int)now);
#else
    return skb_change_tail(ctx, len, 0);
#endif
}

static __attribute__((noinline)) int answer_arp(context *ctx, u32 in)
{
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    struct tally *t = own_tally();
    u8 *data = (void *)(long)ctx->data;
    if (!c || !t || (void *)(data + ARP_FRAME) > (void *)(long)ctx->data_end)
        return VERDICT_PASS;
    struct plan plan = plan_in_force(c);
    if (!plan.table)
        return VERDICT_PASS;
    u8 *arp = data + ETH_LEN;
    /* IPv4 over Ethernet. */
    if (*(u32 *)arp != swap32(0x00010800) || *(u16 *)(arp + 4) != swap16(0x0604))
        return VERDICT_PASS;
    u16 operation = swap16(*(u16 *)(arp + 6));
    u64 sender = mac_at(arp + 8);
    u32 from[4] = {0, 0, swap32(0xffff), *(u32 *)(arp + 14)};
    u32 target[4] = {0, 0, swap32(0xffff), *(u32 *)(arp + 24)};
    if ((operation != 1 && operation != 2) || is_own_mac(c, sender))
        return VERDICT_PASS;
    struct record *owned = from[3] ? find_place(plan, from, 0, 0, KIND_OWNED) : 0;
    if (owned) {
        /* Somebody else claims it. Without the lease it is simply another node's. */
        return is_leased(c, t, owned->group, 1) ? up(ctx, in, UP_CLAIM) : VERDICT_PASS;
    }
    owned = operation == 1 ? find_place(plan, target, 0, 0, KIND_OWNED) : 0;
    if (!owned || (owned->port != PORT_ANY && owned->port != in))
        return VERDICT_PASS;
    if (!is_leased(c, t, owned->group, 1))
        return drop(DROP_NO_LEASE);
    if (!is_unicast(sender))
        return up(ctx, in, UP_DISCOVERY);

    u64 own = port_of(c, in)->mac & HOP_MAC;
    put_macs(data, sender, own);
    *(u16 *)(arp + 6) = swap16(2);
    *(u32 *)(arp + 8) = (u32)own;
    *(u16 *)(arp + 12) = (u16)(own >> 32);
    *(u32 *)(arp + 14) = target[3];
    *(u32 *)(arp + 18) = (u32)sender;
    *(u16 *)(arp + 22) = (u16)(sender >> 32);
    *(u32 *)(arp + 24) = from[3];
    if (trim(ctx, ARP_FRAME))
        return VERDICT_DROP;
    count_event(t, EVENT_ARP_ANSWERED);
    return leave(c, in, in);
}

/* Sum of pseudo-header and message of `ND_LEN` bytes. */
INLINE u64 nd_sum(const u8 *ip)
{
    u64 sum = swap32(ND_LEN) + (u64)swap32(PROTO_ICMPV6);
#pragma unroll
    for (int i = 8; i < IPV6_LEN + ND_LEN; i += 4)
        sum += *(const u32 *)(ip + i);
    return sum;
}

static __attribute__((noinline)) int answer_nd(context *ctx, u32 in, u32 len)
{
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    struct tally *t = own_tally();
    u8 *data = (void *)(long)ctx->data;
    if (!c || !t || (void *)(data + ETH_LEN + IPV6_LEN + 24) > (void *)(long)ctx->data_end)
        return VERDICT_PASS;
    struct plan plan = plan_in_force(c);
    if (!plan.table)
        return VERDICT_PASS;
    u8 *ip = data + ETH_LEN, *nd = ip + IPV6_LEN;
    /* Redirects and what routers say is the host's. */
    if (nd[0] != ND_SOLICITATION && nd[0] != ND_ADVERTISEMENT)
        return VERDICT_PASS;
    u64 sender = mac_at(data + 6);
    u32 target[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        target[i] = *(u32 *)(nd + 8 + 4 * i);
    /* The length that the packet states: without a whole target it has none. */
    if (len < IPV6_LEN + 24 || is_mapped(target))
        return VERDICT_PASS;
    struct record *owned = find_place(plan, target, 0, 0, KIND_OWNED);
    if (!owned)
        return VERDICT_PASS;
    u32 src[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        src[i] = *(u32 *)(ip + 8 + 4 * i);
    if (nd[0] != ND_SOLICITATION || len != IPV6_LEN + ND_LEN || (void *)(nd + ND_LEN) > (void *)(long)ctx->data_end)
        return up(ctx, in, UP_DISCOVERY);
    u64 asker = mac_at(nd + 26);
    /* Duplicate address detection comes from nowhere. */
    if (!(src[0] | src[1] | src[2] | src[3]) || (src[0] & 0xff) == 0xff || ip[7] != 255 || nd[1] || nd[24] != 1 || nd[25] != 1 ||
        !is_unicast(asker) || sum_fold(nd_sum(ip)) != 0xffff)
        return up(ctx, in, UP_DISCOVERY);
    if (is_own_mac(c, sender) || (owned->port != PORT_ANY && owned->port != in))
        return VERDICT_PASS;
    if (!is_leased(c, t, owned->group, 1))
        return drop(DROP_NO_LEASE);

    u64 own = port_of(c, in)->mac & HOP_MAC;
    put_macs(data, asker, own);
    *(u32 *)ip = swap32(0x60000000);
    *(u32 *)(ip + 4) = swap32(ND_LEN << 16 | PROTO_ICMPV6 << 8 | 255);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        *(u32 *)(ip + 8 + 4 * i) = target[i];
        *(u32 *)(ip + 24 + 4 * i) = src[i];
    }
    /* Solicited, override; no router. */
    *(u32 *)nd = swap32(ND_ADVERTISEMENT << 24);
    *(u32 *)(nd + 4) = swap32(0x60000000);
    *(u16 *)(nd + 24) = swap16(0x0201);
    *(u32 *)(nd + 26) = (u32)own;
    *(u16 *)(nd + 30) = (u16)(own >> 32);
    *(u16 *)(nd + 2) = (u16)~sum_fold(nd_sum(ip));
    if (trim(ctx, ND_FRAME))
        return VERDICT_DROP;
    count_event(t, EVENT_ND_ANSWERED);
    return leave(c, in, in);
}

#endif
