/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
#include "maps.h"

#ifdef KOMAINU_XDP
SEC("xdp.frags")
int komainu(struct xdp_md *ctx)
{
    u32 zero = 0;
    (void)ctx;
    map_lookup(&generation, &zero);
    map_lookup(&slots, &zero);
    map_lookup(&config, &zero); map_lookup(&backends, &zero); map_lookup(&services, &zero);
    map_lookup(&leases, &zero); map_lookup(&tally, &zero); map_lookup(&seen, &zero); map_lookup(&traffic, &zero);
    struct flow_key a = {}; map_lookup(&flows, &a);
    struct bound_key b = {}; map_lookup(&bound, &b);
    struct route_key c = {}; map_lookup(&routes, &c);
    struct neighbour_key d = {}; map_lookup(&neighbours, &d);
    map_lookup(&host, &d);
    return XDP_PASS;
}
#else
SEC("classifier")
int komainu(struct __sk_buff *skb)
{
    u32 zero = 0;
    (void)skb;
    map_lookup(&generation, &zero);
    map_lookup(&slots, &zero);
    map_lookup(&config, &zero); map_lookup(&backends, &zero); map_lookup(&services, &zero);
    map_lookup(&leases, &zero); map_lookup(&tally, &zero); map_lookup(&seen, &zero); map_lookup(&traffic, &zero);
    struct flow_key a = {}; map_lookup(&flows, &a);
    struct bound_key b = {}; map_lookup(&bound, &b);
    struct route_key c = {}; map_lookup(&routes, &c);
    struct neighbour_key d = {}; map_lookup(&neighbours, &d);
    map_lookup(&host, &d);
    return -1;
}
#endif

char LICENSE[] SEC("license") = "Dual MIT/GPL";
