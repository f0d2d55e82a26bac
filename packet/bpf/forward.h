/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/* Between clients and backends: `src/engine/{forward,nat}.rs`. */
#ifndef KOMAINU_FORWARD_H
#define KOMAINU_FORWARD_H

#include "make.h"
#include "rewrite.h"

/* What becomes of a packet's flow besides `last_seen`. */
enum deed {
    DEED_NONE,
    DEED_MAKE,   /* there is none, and it is made */
    DEED_REOPEN, /* it was closing, and begins anew */
    DEED_CHANGE, /* its state may change */
};

/* A packet of a client to a service. */
INLINE int forward_request(context *ctx, int v6, const struct config *c, struct tally *t, u32 in, const struct packet *p, const struct record *r)
{
    u64 until = lease_until(r->group, 0), now = time_before(c, t, until);
    if (now >= until)
        return drop(DROP_NO_LEASE);
    if (unlikely(r->flags & RECORD_UP))
        return up(ctx, in, UP_ROOM);
    const int routed = r->mode != MODE_DSR;
    if (routed && unlikely(p->ttl <= 1))
        return up(ctx, in, UP_TTL);

    struct flow *f = 0;
    u32 number, hash = 0;
    enum deed deed = DEED_NONE;
    if (r->flags & RECORD_TRACKS_ALL) {
        f = find_flow(c, p, r->service);
        if (!f) {
            if (!(r->flags & RECORD_MAKES) || !(is_syn(p) || p->protocol == PROTO_UDP))
                return up(ctx, in, UP_FLOW);
            deed = DEED_MAKE;
        }
    } else {
        hash = hash_flow(HASH_SEED, v6, p->src, p->src_port, p->dst, p->dst_port, p->protocol);
        if (p->protocol == PROTO_TCP) {
            u32 service = r->service;
            struct service *s = map_lookup(&services, &service);
            if (!s)
                return up(ctx, in, UP_ROOM);
            u32 flags = READ_ONCE(s->flags);
            if (flags & SERVICE_CONSULT && may_be_remembered(s, hash)) {
                f = find_flow(c, p, service);
                if (!f && !(flags & SERVICE_CONCLUSIVE))
                    return up(ctx, in, UP_FLOW);
            }
        }
    }
    if (f) {
        u32 word = READ_ONCE(*word_of(f));
        number = f->backend;
        if (unlikely(!is_plain(p) || !(word & FLOW_STEADY))) {
            if (!(word & FLOW_KEPT))
                return up(ctx, in, is_plain(p) ? UP_UNSTEADY : UP_SEGMENT);
            deed = is_syn(p) && reopens(WORD_PROGRESS(word)) ? DEED_REOPEN : DEED_CHANGE;
        }
    }
    if (!f || deed == DEED_REOPEN) {
        if (deed)
            hash = hash_flow(HASH_SEED, v6, p->src, p->src_port, p->dst, p->dst_port, p->protocol);
        if (r->flags & RECORD_SOURCE_IP)
            hash = hash_client(HASH_SEED, v6, p->src);
        u32 slot = find_slot(r->current, r->current_size, hash);
        if (f && (!(r->flags & RECORD_MAKES) || !(slot & SLOT_ALIVE) || (slot & SLOT_NUMBER) != number + 1))
            return up(ctx, in, UP_SEGMENT);
        /* A datagram that is not tracked goes where the hash says now, and so does a flow that is made now. */
        if (unlikely(slot & SLOT_MOVED) && p->protocol == PROTO_TCP && !deed) {
            u32 base = find_slot(r->base, r->base_size, hash);
            if ((base ^ slot) & SLOT_NUMBER)
                return up(ctx, in, UP_FLOW);
        }
        if (unlikely(!(slot & SLOT_ALIVE))) {
            /* What becomes of older flows of a dead backend is the policy's business. */
            if (slot & SLOT_NUMBER && p->protocol == PROTO_TCP && !is_syn(p))
                return up(ctx, in, UP_DEAD_BACKEND);
            return drop(DROP_NO_BACKEND);
        }
        number = (slot & SLOT_NUMBER) - 1;
    }
    struct backend *b = map_lookup(&backends, &number);
    if (!b)
        return up(ctx, in, UP_ROOM);
    if (f && deed != DEED_REOPEN) {
        u8 flags = READ_ONCE(b->flags);
        if (!(flags & BACKEND_IN_PLAN) || !(flags & BACKEND_ALIVE || r->flags & RECORD_KEEP))
            return up(ctx, in, UP_DEAD_BACKEND);
    }
    u64 hop = READ_ONCE(b->hop);
    /* A flow learns of its packet, although there is no way for it. */
    if (unlikely(!(hop & HOP_KNOWN)))
        return hop & HOP_NONE && (!f || !deed) ? drop(DROP_NO_ROUTE) : up(ctx, in, UP_NEIGHBOUR);
    if (!routed && unlikely(!(hop & HOP_ON_LINK)))
        return drop(DROP_OFF_LINK);
    u32 out = HOP_PORT(hop);
    struct size size = size_of(ctx, p);
    if (unlikely(size.largest > port_of(c, out)->mtu))
        return up(ctx, in, UP_TOO_BIG);
    struct traffic *passed = own_traffic(c, number);
    if (!passed)
        return up(ctx, in, UP_ROOM);

    /* From here on it leaves. */
    u64 own = port_of(c, out)->mac;
    if (!routed) {
        if (!rewrite_macs(ctx, hop, own))
            return VERDICT_DROP;
    } else {
        struct end src = {}, dst = {(const u32 *)b->address, b->port};
        if (r->mode == MODE_NAT) {
            if (f) {
                if (!(f->flags & FLOW_BOUND))
                    return up(ctx, in, UP_FLOW);
                if (unlikely(deed) && !(deed == DEED_REOPEN ? reopen_flow(f, p, r, now) : note_segment(f, p->flags, 0, now)))
                    return up(ctx, in, UP_NOTE);
                src.address = (const u32 *)f->snat;
                src.port = f->snat_port;
            } else {
                struct flow *made = make_flow(p, r, number, now);
                if (!made)
                    return up(ctx, in, UP_NOTE);
                src.address = (const u32 *)made->snat;
                src.port = made->snat_port;
            }
        }
        int done = p->protocol == PROTO_TCP ? rewrite_ends(ctx, v6, 1, src, dst, hop, own)
                                            : rewrite_ends(ctx, v6, 0, src, dst, hop, own);
        if (!done)
            return VERDICT_DROP;
    }
    if (f)
        note_seen(&f->last_seen, now);
    else if (!deed)
        count_seen(number, hash, now);
    passed->packets += size.packets;
    passed->bytes += size.bytes;
    if (deed == DEED_MAKE || (is_syn(p) && (!f || deed == DEED_REOPEN)))
        passed->new_flows++;
    count_event(t, EVENT_FORWARDED);
    return leave(c, in, out);
}

/* A packet from a backend back to its client. The lease has been looked at. `changed`: a kept flow whose state the packet may
 * change. */
INLINE int forward_answer(context *ctx, int v6, const struct config *c, struct tally *t, u32 in, const struct packet *p, u32 number, struct end src,
                          struct end dst, u64 *last_seen, struct flow *changed, u64 now)
{
    if (unlikely(p->ttl <= 1))
        return up(ctx, in, UP_TTL);
    u64 hop = way_to(dst.address ? dst.address : p->dst);
    if (unlikely(!(hop & HOP_KNOWN)))
        return hop & HOP_NONE ? drop(DROP_NO_ROUTE) : up(ctx, in, UP_NEIGHBOUR);
    u32 out = HOP_PORT(hop);
    struct size size = size_of(ctx, p);
    if (unlikely(size.largest > port_of(c, out)->mtu))
        return up(ctx, in, UP_TOO_BIG);
    struct traffic *passed = own_traffic(c, number);
    if (!passed)
        return up(ctx, in, UP_ROOM);
    if (unlikely(changed) && !note_segment(changed, p->flags, 1, now))
        return up(ctx, in, UP_NOTE);

    u64 own = port_of(c, out)->mac;
    int done = p->protocol == PROTO_TCP ? rewrite_ends(ctx, v6, 1, src, dst, hop, own)
                                        : rewrite_ends(ctx, v6, 0, src, dst, hop, own);
    if (!done)
        return VERDICT_DROP;
    if (last_seen)
        note_seen(last_seen, now);
    passed->return_packets += size.packets;
    passed->return_bytes += size.bytes;
    count_event(t, EVENT_RETURNED);
    return leave(c, in, out);
}

/* A packet to a SNAT address: an answer of a full-NAT backend, or nothing of ours. */
INLINE int answer_bound(context *ctx, int v6, const struct config *c, struct tally *t, u32 in, const struct packet *p, u32 group)
{
    u64 until = lease_until(group, 0), now = time_before(c, t, until);
    if (now >= until)
        return drop(DROP_NO_LEASE);
    struct flow *f = find_answered(c, p);
    if (!f)
        return c->flags & CONFIG_BOUND_COMPLETE ? drop(DROP_NO_BINDING) : up(ctx, in, UP_FLOW);
    u32 number = f->service;
    struct service *s = map_lookup(&services, &number);
    if (!s)
        return up(ctx, in, UP_ROOM);
    if (!(READ_ONCE(s->flags) & SERVICE_IN_PLAN))
        return drop(DROP_NO_SERVICE);
    if (s->group != group && !is_leased(c, t, s->group, 0))
        return drop(DROP_NO_LEASE);
    struct flow *changed = 0;
    u32 flow_flags = READ_ONCE(f->flags);
    if (unlikely(!is_plain(p) || !(flow_flags & FLOW_STEADY))) {
        if (!(flow_flags & FLOW_KEPT))
            return up(ctx, in, is_plain(p) ? UP_UNSTEADY : UP_SEGMENT);
        changed = f;
    }
    struct end src = {(const u32 *)s->vip, s->port}, dst = {(const u32 *)f->client, f->client_port};
    return forward_answer(ctx, v6, c, t, in, p, f->backend, src, dst, &f->last_seen, changed, now);
}

/* A packet from a `nat-transparent` backend to a client. */
INLINE int answer_transparent(context *ctx, int v6, const struct config *c, struct tally *t, u32 in, const struct packet *p, const struct record *r)
{
    u64 until = lease_until(r->group, 0), now = time_before(c, t, until);
    if (now >= until)
        return drop(DROP_NO_LEASE);
    if (unlikely(r->flags & RECORD_UP))
        return up(ctx, in, UP_ROOM);
    u32 number = r->service;
    struct service *s = map_lookup(&services, &number);
    if (!s)
        return up(ctx, in, UP_ROOM);
    u64 *last_seen = 0;
    u32 flags = READ_ONCE(s->flags);
    if (flags & SERVICE_CONSULT &&
        may_be_remembered(s, hash_flow(HASH_SEED, v6, p->dst, p->dst_port, (const u32 *)r->vip, r->vip_port, p->protocol))) {
        struct flow *f = find_flow_back(c, p, number);
        if (f) {
            if (!is_plain(p))
                return up(ctx, in, UP_SEGMENT);
            if (!(f->flags & FLOW_STEADY))
                return up(ctx, in, UP_UNSTEADY);
            last_seen = &f->last_seen;
        } else if (!(flags & SERVICE_CONCLUSIVE)) {
            return up(ctx, in, UP_FLOW);
        }
    }
    struct end src = {(const u32 *)r->vip, r->vip_port}, dst = {};
    return forward_answer(ctx, v6, c, t, in, p, r->backend, src, dst, last_seen, 0, now);
}

/* Whether an address is neither the host's own nor one of many: engine/core.rs. */
INLINE int is_foreign(int v6, const u32 *address)
{
    u32 last = swap32(address[3]), first = swap32(address[0]);
    if (!v6) {
        if (last >> 28 == 0xe || last == 0xffffffff || last >> 16 == 0xa9fe || last == 0 || last >> 24 == 127)
            return 0;
    } else if (first >> 24 == 0xff || first >> 22 == 0xfe80 >> 6) {
        return 0;
    } else if (!(address[0] | address[1] | address[2]) && last <= 1) {
        return 0;
    }
    struct host_key key;
    u32 *words = (u32 *)key.address;
    words[0] = address[0], words[1] = address[1], words[2] = address[2], words[3] = address[3];
    return !map_lookup(&host, &key);
}

#endif
