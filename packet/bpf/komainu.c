/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * The kernel lanes: for each frame exactly what the engine in user space (`src/engine`) would do, same bytes and same counters, or
 * the frame goes up to it untouched. Nothing is decided here that has to be remembered, except for kept flows (make.h).
 *
 *   frame ─┬─ to another MAC, by another interface, tagged ─────────────────────────────▶ pass
 *          ├─ ARP, neighbour solicitation for an address of ours ───────── answer.h ────▶ leave, up
 *          ├─ TCP, UDP ─┬─ to a service ───────── forward.h: request ───────────────────▶ leave, up, drop
 *          │            ├─ to a SNAT address ──── forward.h: answer ────────────────────▶ leave, up, drop
 *          │            └─ from a nat-transparent backend ──────────────────────────────▶ leave, up, drop
 *          ├─ fragments, options, ICMP, broken headers, of ours ────────────────────────▶ up
 *          └─ anything else ────────────────────────────────────────────────────────────▶ pass, drop
 *
 * Compiled twice, for XDP and for tc.
 */
#include "answer.h"
#include "forward.h"

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_ARP 0x0806
#define ETHERTYPE_IPV6 0x86dd

/* IP that is no plain TCP or UDP. */
static __attribute__((noinline)) int odd(context *ctx, const struct packet *p, u32 in, u32 v6, u32 parsed, u32 to_us)
{
    u32 zero = 0;
    struct config *c = map_lookup(&config, &zero);
    if (!p || !c)
        return VERDICT_PASS;
    struct plan plan = plan_in_force(c);
    if (!plan.table)
        return VERDICT_PASS;
    struct record *owned = find_place(plan, p->dst, 0, 0, KIND_OWNED);
    switch (parsed) {
    case PARSED_BROKEN:
        return owned && to_us ? up(ctx, in, UP_MALFORMED) : VERDICT_PASS;
    case PARSED_OTHER:
        return owned ? drop(to_us ? DROP_PROTOCOL : DROP_LINK_BROADCAST) : VERDICT_PASS;
    case PARSED_ICMP:
        if (owned)
            return up(ctx, in, UP_ICMP);
        /* An error about what a nat-transparent backend sent or got comes to the client, from any router on the way. */
        if (to_us && c->flags & (v6 ? CONFIG_THROUGH_V6 : CONFIG_THROUGH_V4) && is_foreign(v6, p->dst))
            return up(ctx, in, UP_ICMP);
        return VERDICT_PASS;
    default:
        if (!owned && !(to_us && find_place(plan, p->src, 0, 0, KIND_BACKEND) && is_foreign(v6, p->dst)))
            return VERDICT_PASS;
        return up(ctx, in, parsed == PARSED_FRAGMENT ? UP_FRAGMENT : UP_OPTIONS);
    }
}

INLINE int handle_ip(context *ctx, int v6, const struct config *c, struct tally *t, u32 in, u32 to_us)
{
    struct packet p = {};
    enum parsed parsed = v6 ? parse_v6(ctx, &p) : parse_v4(ctx, &p);
    if (parsed == PARSED_SHORT || (v6 && is_mapped(p.dst)))
        return VERDICT_PASS;
    if (v6 && parsed == PARSED_ICMP) {
        u8 *type = (void *)(long)ctx->data + ETH_LEN + IPV6_LEN;
        if ((void *)(type + 1) > (void *)(long)ctx->data_end)
            return VERDICT_PASS;
        /* Router solicitation up to redirect. */
        if (*type >= 133 && *type <= 137)
            return answer_nd(ctx, in, p.len);
    }
    if (unlikely(parsed != PARSED))
        return odd(ctx, &p, in, v6, parsed, to_us);
    struct plan plan = plan_in_force(c);
    if (unlikely(!plan.table))
        return VERDICT_PASS;
    if (unlikely(!to_us))
        return find_place(plan, p.dst, 0, 0, KIND_OWNED) ? drop(DROP_LINK_BROADCAST) : VERDICT_PASS;
    struct record *r = find_place(plan, p.dst, p.dst_port, p.protocol, KIND_SERVICE);
    if (r)
        return forward_request(ctx, v6, c, t, in, &p, r);
    r = find_place(plan, p.dst, 0, 0, KIND_OWNED);
    if (r) {
        if (r->flags & RECORD_SNAT)
            return answer_bound(ctx, v6, c, t, in, &p, r->group);
        return drop(is_leased(c, t, r->group, 0) ? DROP_NO_SERVICE : DROP_NO_LEASE);
    }
    if (v6 && is_mapped(p.src))
        return VERDICT_PASS;
    r = find_place(plan, p.src, p.src_port, p.protocol, KIND_ANSWER);
    if (r && is_foreign(v6, p.dst))
        return answer_transparent(ctx, v6, c, t, in, &p, r);
    return VERDICT_PASS;
}

INLINE int handle(context *ctx, u32 ifindex)
{
    u32 zero = 0, in;
    struct config *c = map_lookup(&config, &zero);
    struct tally *t = own_tally();
    if (!c || !t)
        return VERDICT_PASS;
    if (ifindex == c->ports[PORT_SERVICE].ifindex)
        in = PORT_SERVICE;
    else if (ifindex == c->ports[PORT_INSIDE].ifindex)
        in = PORT_INSIDE;
    else
        return VERDICT_PASS;
    u8 *data = (void *)(long)ctx->data;
    if ((void *)(data + ETH_LEN) > (void *)(long)ctx->data_end)
        return VERDICT_PASS;
    u64 own = READ_ONCE(c->ports[in].mac), dst = mac_at(data);
    u32 to_us = dst == own;
    if (!own || (!to_us && !(dst & 1)))
        return VERDICT_PASS;
    switch (*(u16 *)(data + 12)) {
    case swap16(ETHERTYPE_IPV4):
        return handle_ip(ctx, 0, c, t, in, to_us);
    case swap16(ETHERTYPE_IPV6):
        return handle_ip(ctx, 1, c, t, in, to_us);
    case swap16(ETHERTYPE_ARP):
        return answer_arp(ctx, in);
    default:
        return VERDICT_PASS;
    }
}

#ifdef KOMAINU_XDP
SEC("xdp.frags")
int komainu(struct xdp_md *ctx)
{
    return handle(ctx, ctx->ingress_ifindex);
}
#else
/* Bytes at the beginning of a frame that are read directly. */
INLINE u32 headers_of(struct __sk_buff *ctx)
{
    const u8 *data = (void *)(long)ctx->data;
    int v6 = ctx->protocol == swap16(ETHERTYPE_IPV6);
    if (!v6 && ctx->protocol != swap16(ETHERTYPE_IPV4))
        return ARP_FRAME;
    if ((void *)(data + ETH_LEN + IPV4_LEN) > (void *)(long)ctx->data_end)
        return ND_FRAME;
    u32 ip = ETH_LEN + (v6 ? IPV6_LEN : IPV4_LEN);
    switch (v6 ? data[ETH_LEN + 6] : data[ETH_LEN + 9]) {
    case PROTO_TCP:
        return ip + TCP_LEN;
    case PROTO_UDP:
        return ip + UDP_LEN;
    default:
        return v6 ? ND_FRAME : ip;
    }
}

SEC("classifier")
int komainu(struct __sk_buff *ctx)
{
    /* A tag of another network (the host's VLAN interfaces). Tag 0 only carries a priority, but is not ours to put back: the engine
     * has the frame without it. */
    if (ctx->vlan_present && ctx->vlan_tci & 0x0fff)
        return VERDICT_PASS;
    /* A host's own frames have their headers, and nothing else, in what can be read directly. To pull one byte more into it copies all of
     * it to another place, for every super-frame. */
    u32 direct = ctx->data_end - ctx->data;
    if (direct < ND_FRAME && ctx->len > direct) {
        u32 headers = headers_of(ctx);
        if (unlikely(direct < headers))
            skb_pull(ctx, ctx->len < headers ? ctx->len : headers);
    }
    return handle(ctx, ctx->ifindex);
}
#endif

char LICENSE[] SEC("license") = "Dual MIT/GPL";
