//! The API server stops, returns with compacted history, fails or denies requests: agents continue
//! with what they know, and catch up.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use dataplane_fake_apiserver::{Fault, Requests, WatchEnd};
use dataplane_testkit::{
    lab::{
        Checks, Client, Cluster, Family, Pod, Process, Service, Source, Spec, WEB_PORT, agent_user,
        service_addresses, wait,
    },
    run,
    traffic::report::{Datagrams, Request},
};
use serde_json::json;

/// How long the API server is stopped.
const OUTAGE: Duration = Duration::from_secs(60);
const TIMEOUT: Duration = Duration::from_secs(120);
const INTERVAL: Duration = Duration::from_millis(10);

fn spec(nodes: usize) -> Spec {
    Spec { source: Source::kubernetes(), connect_tcp: false, ..Spec::new(nodes) }
}

/// A cluster with a client on the first node and two servers on the last. The first server, with
/// this name, is the backend of the service.
fn with_service(spec: &Spec, name: &str) -> Result<(Cluster, [Pod; 3], [Process; 2])> {
    let mut cluster = Cluster::create(spec)?;
    let last = spec.nodes.len() - 1;
    let made = (|| Ok([cluster.pod(0, "client")?, cluster.pod(last, name)?, cluster.pod(last, "late")?]))();
    let [client, web, late] = cluster.explain(made)?;
    let servers = [web.serve()?, late.serve()?];
    cluster.apply(&Service::of(&[&web]))?;
    Ok((cluster, [client, web, late], servers))
}

/// Traffic that must not be affected: requests to the service, datagrams between pods of two nodes.
struct BackgroundTraffic(Vec<(Family, Client<Vec<Request>>, Client<Datagrams>)>);

impl BackgroundTraffic {
    fn start(client: &Pod, far: &Pod, web: &Service) -> Result<Self> {
        let start = |family| {
            let requests = client.place().keep_getting(web.at(family, WEB_PORT), INTERVAL)?;
            let datagrams = client.place().keep_sending(far.echo(family), INTERVAL, &[])?;
            Ok((family, requests, datagrams))
        };
        Ok(Self(Family::BOTH.into_iter().map(start).collect::<Result<_>>()?))
    }

    fn check(self, checks: &mut Checks) {
        for (family, requests, datagrams) in self.0 {
            checks.nothing_lost(family, requests, datagrams);
        }
    }
}

#[test]
fn traffic_and_new_pods_work_without_an_api_server() -> Result<()> {
    let spec = spec(2);
    let (mut cluster, [client, far, late], _servers) = with_service(&spec, "far")?;
    let background = BackgroundTraffic::start(&client, &far, &Service::of(&[&far]))?;
    let mut checks = Checks::of(spec.describe());

    cluster.control_mut()?.server_mut().stop()?;
    let stopped = Instant::now();
    for node in cluster.nodes_mut() {
        let name = node.name().to_owned();
        checks.that(format!("{name} reports that the API server cannot be reached"), || {
            node.agent_mut().until("a problem about the API server", |agent| {
                let status = agent.status()?.status;
                let text = serde_json::to_string(&status)?;
                Ok(text.contains("cannot reach any API server").then_some(()))
            })
        });
    }
    // an agent restarted now has only its cached state
    cluster.nodes_mut()[0].agent_mut().kill()?;
    cluster.nodes_mut()[0].agent_mut().start()?;
    cluster.nodes_mut()[0].agent_mut().until("an agent that uses its cached state", |agent| {
        let status = agent.status()?.status;
        // without a complete list it removes nothing; it has all it needs for pods
        let lacks: Vec<_> = status.not_ready.iter().map(|not_ready| not_ready.check.as_str()).collect();
        ensure!(lacks.iter().all(|check| ["source", "reconcile"].contains(check)), "not ready: {lacks:?}");
        Ok((status.pins_adopted > 0).then_some(()))
    })?;
    let newcomer = cluster.pod(0, "newcomer");
    let newcomer = cluster.explain(newcomer)?;
    checks.that("a pod created during the outage is connected", || {
        for family in Family::BOTH {
            newcomer.place().get_as(far.web(family), 3, Some("far"), newcomer.address(family))?;
            newcomer.place().get_as(
                Service::of(&[&far]).at(family, WEB_PORT),
                3,
                Some("far"),
                newcomer.address(family),
            )?;
        }
        Ok(())
    });
    wait::until("the end of the outage", OUTAGE + TIMEOUT, || {
        Ok((stopped.elapsed() >= OUTAGE).then_some(()))
    })?;

    cluster.control_mut()?.server_mut().restart()?;
    let back = Instant::now();
    let caught_up = cluster.apply(&Service::of(&[&far, &late]));
    cluster.explain(caught_up)?;
    eprintln!(
        "API server back after {:.0?}; its first change was applied after {:.1?}",
        stopped.elapsed(),
        back.elapsed()
    );
    background.check(&mut checks);
    checks.finish(&cluster)
}

#[test]
fn agents_catch_up_after_compacted_history() -> Result<()> {
    let spec = spec(2);
    let (mut cluster, [client, far, late], _servers) = with_service(&spec, "far")?;
    let deleted = Service {
        name: "deleted".to_owned(),
        addresses: service_addresses(2).to_vec(),
        ..Service::of(&[&far])
    };
    cluster.apply(&deleted)?;
    let background = BackgroundTraffic::start(&client, &far, &Service::of(&[&far]))?;

    // agents are disconnected before the changes, and the changes are compacted when they reconnect
    cluster.control_mut()?.server_mut().stop()?;
    cluster.control()?.set_connected(cluster.fabric(), false)?;
    cluster.control_mut()?.server_mut().restart()?;
    cluster.withdraw("service-deleted")?;
    let web = Service::of(&[&far, &late]);
    cluster.apply_objects("service-web", &web.objects())?;
    cluster.control_mut()?.server_mut().restart_compacted()?;
    cluster.control()?.set_connected(cluster.fabric(), true)?;

    let mut checks = Checks::of(spec.describe());
    for node in cluster.nodes_mut() {
        let name = node.name().to_owned();
        checks.that(format!("{name} applies the change"), || node.await_service(&web));
        checks.that(format!("{name} applies the deletion"), || {
            node.agent_mut().until("removal of a service", |agent| {
                let views: Vec<dataplane_agent::api::views::ServiceView> =
                    agent.ask(&dataplane_agent::api::request::View::Services)?;
                Ok(views.iter().all(|view| view.name != "deleted").then_some(()))
            })
        });
    }
    background.check(&mut checks);
    checks.finish(&cluster)
}

#[test]
fn no_change_is_missed_after_failed_requests_and_broken_watches() -> Result<()> {
    let spec = spec(1);
    let mut cluster = Cluster::create(&spec)?;
    let pods = cluster
        .explain((|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "near")?, cluster.pod(0, "late")?)))());
    let (client, near, late) = pods?;
    let _servers = [near.serve()?, late.serve()?];
    let both: [&[&Pod]; 2] = [&[&near, &late], &[&near]];
    cluster.apply(&Service::of(both[1]))?;
    if cluster.control()?.server().fake().is_none() {
        run::skip("only the fake API server can inject failures");
        return Ok(());
    }
    let background = BackgroundTraffic::start(&client, &near, &Service::of(both[1]))?;
    let user = || Requests { user: Some(agent_user().name), ..Requests::all() };
    let watches = || Requests { verb: Some("watch"), ..user() };
    let lists = || Requests { verb: Some("list"), ..user() };
    let faults: [(&str, Requests, Fault); 7] = [
        ("500", user(), Fault::internal()),
        ("429", user(), Fault::too_many_requests(1)),
        ("410 as response", watches(), Fault::gone()),
        ("slow", user(), Fault::Delay(Duration::from_secs(1))),
        ("truncated", user(), Fault::Truncate),
        ("trickling", lists(), Fault::Trickle(512, Duration::from_millis(1))),
        ("of wrong types", watches(), Fault::WrongTypes),
    ];
    let mut checks = Checks::of(spec.describe());
    for (round, (what, requests, fault)) in faults.into_iter().enumerate() {
        for how in [WatchEnd::Closed, WatchEnd::Reset] {
            let server = cluster.control()?.server().fake().context("the fake API server")?;
            server.faults().next(5, requests.clone(), fault.clone());
            server.compact();
            server.drop_watches(how);
            let arrived = cluster
                .apply(&Service::of(both[round % 2]))
                .and_then(|()| cluster.apply(&Service::of(both[1 - round % 2])));
            checks.that(format!("responses {what}, watches ended by {how:?}"), || arrived);
            cluster.control()?.server().fake().context("the fake API server")?.faults().clear();
        }
    }
    let web = Service::of(both[1]);
    cluster.apply(&web)?;
    let server = cluster.control()?.server().fake().context("the fake API server")?;
    for line in [
        r#"{"type":"ADDED","object":{"apiVersion":"v1","kind":"Service","metadata":17}}"#,
        r#"{"type":"MODIFIED","object":{"kind":"Service"}}"#,
        r#"{"type":"WHATEVER","object":{}}"#,
        "this is no JSON",
    ] {
        server.faults().send_to_watches("services", line);
        server.faults().send_to_watches("endpointslices", line);
    }
    let arrived = cluster.apply(&Service::of(both[0])).and_then(|()| cluster.apply(&web));
    checks.that("watch lines that are no events", || arrived);
    background.check(&mut checks);
    checks.finish(&cluster)
}

#[test]
fn missing_permission_is_reported_and_changes_are_applied_once_granted() -> Result<()> {
    let spec = spec(1);
    let (mut cluster, [client, near, late], _servers) = with_service(&spec, "near")?;
    let background = BackgroundTraffic::start(&client, &near, &Service::of(&[&near]))?;

    let binding = "ClusterRoleBinding";
    let rbac = "rbac.authorization.k8s.io/v1";
    let objects = cluster.control()?.objects().clone();
    let granted =
        objects.get(rbac, binding, "", "dataplane-agent")?.context("the agents' role is not bound")?;
    objects.delete(std::slice::from_ref(&granted))?;
    // permissions are checked per request: a restarted agent sends new ones
    cluster.nodes_mut()[0].agent_mut().kill()?;
    cluster.nodes_mut()[0].agent_mut().start()?;
    let mut checks = Checks::of(spec.describe());
    checks.that("status names the permission", || {
        cluster.nodes_mut()[0].agent_mut().until("a problem", |agent| {
            let status = agent.status()?.status;
            let problems: Vec<_> = status.problems.iter().map(|problem| problem.message.as_str()).collect();
            let named = problems.iter().any(|problem| {
                problem.contains("denied")
                    && problem.contains("services")
                    && problem.contains(&agent_user().name)
            });
            if named { Ok(Some(())) } else { Err(anyhow!("problems: {problems:?}")) }
        })
    });
    checks.that("existing services still work", || {
        for family in Family::BOTH {
            client.place().get_as(
                Service::of(&[]).at(family, WEB_PORT),
                5,
                Some("near"),
                client.address(family),
            )?;
        }
        Ok(())
    });
    objects.apply(&[json!({
        "apiVersion": rbac,
        "kind": binding,
        "metadata": {"name": "dataplane-agent"},
        "roleRef": granted["roleRef"],
        "subjects": granted["subjects"],
    })])?;
    let arrived = cluster.apply(&Service::of(&[&near, &late]));
    checks.that("a change is applied once the permission is granted", || arrived);
    background.check(&mut checks);
    checks.finish(&cluster)
}
