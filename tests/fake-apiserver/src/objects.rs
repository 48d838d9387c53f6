//! Objects of an API server, ours or the real one, from tests that do not await: a client of its own on a thread of its
//! own, which may be in another network namespace.

use std::{
    fs::File,
    sync::{Arc, mpsc},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kube::{
    Client, Config,
    api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::sync::mpsc as queue;

use super::{namespace, resources::Resource};

/// Requests of [`Objects::apply_many`] that wait for their answers together.
const AT_ONCE: usize = 16;

type Work = Box<dyn FnOnce(Client) -> futures::future::BoxFuture<'static, ()> + Send>;

/// A user's hands on the objects of an API server.
#[derive(Clone, Debug)]
pub struct Objects {
    work: queue::UnboundedSender<Work>,
}

impl Objects {
    /// As whom a kubeconfig is for; in this network namespace or where we are.
    pub fn connect(kubeconfig: &str, namespace: Option<Arc<File>>) -> Result<Self> {
        let text = kubeconfig.to_owned();
        let (work, mut queue) = queue::unbounded_channel::<Work>();
        let (report, ready) = mpsc::channel();
        thread::Builder::new().name("apiserver-client".to_owned()).spawn(move || {
            let mut serve = || -> Result<()> {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    let config = Kubeconfig::from_yaml(&text)?;
                    let config =
                        Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
                    let client = Client::try_from(config)?;
                    let _told = report.send(Ok(()));
                    while let Some(work) = queue.recv().await {
                        work(client.clone()).await;
                    }
                    Ok(())
                })
            };
            let served =
                namespace.map_or(Ok(()), |namespace| namespace::enter(&namespace)).and_then(|()| serve());
            // nobody listens after a good start
            let _told = report.send(served);
        })?;
        ready.recv().map_err(|_ended| anyhow!("the client's thread ended"))?.context("make a client")?;
        Ok(Self { work })
    }

    /// Does something with a client, on its thread.
    pub fn with<T, F>(&self, work: impl FnOnce(Client) -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (report, done) = mpsc::channel();
        let work: Work = Box::new(move |client| {
            Box::pin(async move {
                let _gone = report.send(work(client).await);
            })
        });
        self.work.send(work).map_err(|_ended| anyhow!("the client has ended"))?;
        done.recv().map_err(|_ended| anyhow!("the client has ended"))
    }

    /// Makes the objects what they are here: created, or replaced, with their status where that is written apart.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        for object in objects {
            let object = for_server(object);
            let what = describe(&object);
            self.with(move |client| async move { apply(client, &object).await })?
                .with_context(|| format!("apply {what}"))?;
        }
        Ok(())
    }

    /// As [`Self::apply`], of many at once, in no order.
    pub fn apply_many(&self, objects: &[Value]) -> Result<()> {
        let objects: Vec<Value> = objects.iter().map(for_server).collect();
        self.with(move |client| async move {
            let all = stream::iter(objects.into_iter().map(|object| {
                let client = client.clone();
                async move {
                    let what = describe(&object);
                    apply(client, &object).await.with_context(|| format!("apply {what}"))
                }
            }));
            all.buffer_unordered(AT_ONCE).try_collect::<()>().await
        })?
    }

    /// Creates one; as the server keeps it.
    pub fn create(&self, object: &Value) -> Result<Value> {
        let object = for_server(object);
        let what = describe(&object);
        let created = self.with(move |client| async move {
            let (api, object) = api(client, &object)?;
            anyhow::Ok(serde_json::to_value(api.create(&PostParams::default(), &object).await?)?)
        })?;
        created.with_context(|| format!("create {what}"))
    }

    /// Deletes them at once; those that do not exist are fine.
    pub fn delete(&self, objects: &[Value]) -> Result<()> {
        for object in objects {
            let object = object.clone();
            let what = describe(&object);
            let deleted = self.with(move |client| async move {
                let (api, named) = api(client, &object)?;
                let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
                match api.delete(&named.metadata.name.unwrap_or_default(), &now).await {
                    Ok(_) => Ok(()),
                    Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
                    Err(error) => Err(anyhow!(error)),
                }
            })?;
            deleted.with_context(|| format!("delete {what}"))?;
        }
        Ok(())
    }

    /// Merges `change` (`{"status": ..}`) into the status of one.
    pub fn patch_status(&self, object: &Value, change: &Value) -> Result<()> {
        let (object, change) = (object.clone(), change.clone());
        let what = describe(&object);
        let patched = self.with(move |client| async move {
            let (api, named) = api(client, &object)?;
            let name = named.metadata.name.unwrap_or_default();
            api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&change)).await?;
            anyhow::Ok(())
        })?;
        patched.with_context(|| format!("patch the status of {what}"))
    }

    /// Merges `change` into one.
    pub fn patch(&self, object: &Value, change: &Value) -> Result<()> {
        let (object, change) = (object.clone(), change.clone());
        let what = describe(&object);
        let patched = self.with(move |client| async move {
            let (api, named) = api(client, &object)?;
            let name = named.metadata.name.unwrap_or_default();
            api.patch(&name, &PatchParams::default(), &Patch::Merge(&change)).await?;
            anyhow::Ok(())
        })?;
        patched.with_context(|| format!("patch {what}"))
    }

    /// One, if it exists.
    pub fn get(&self, api_version: &str, kind: &str, namespace: &str, name: &str) -> Result<Option<Value>> {
        let object = json!({
            "apiVersion": api_version, "kind": kind, "metadata": {"namespace": namespace, "name": name},
        });
        let what = describe(&object);
        let found = self.with(move |client| async move {
            let (api, named) = api(client, &object)?;
            let found = api.get_opt(&named.metadata.name.unwrap_or_default()).await?;
            anyhow::Ok(found.map(serde_json::to_value).transpose()?)
        })?;
        found.with_context(|| format!("get {what}"))
    }

    /// All of a kind, in a namespace or (empty) everywhere.
    pub fn list(&self, api_version: &str, kind: &str, namespace: &str) -> Result<Vec<Value>> {
        let object = json!({
            "apiVersion": api_version, "kind": kind, "metadata": {"namespace": namespace, "name": ""},
        });
        let listed = self.with(move |client| async move {
            let (api, _) = api(client, &object)?;
            let list = api.list(&ListParams::default()).await?;
            let items = list.items.into_iter().map(serde_json::to_value);
            anyhow::Ok(items.collect::<serde_json::Result<Vec<Value>>>()?)
        })?;
        listed.with_context(|| format!("list {kind}"))
    }
}

async fn apply(client: Client, object: &Value) -> Result<()> {
    let (api, mut wanted) = api(client, object)?;
    let name = wanted.metadata.name.clone().unwrap_or_default();
    let kept = match api.get_opt(&name).await? {
        None => api.create(&PostParams::default(), &wanted).await?,
        Some(old) => {
            wanted.metadata.resource_version = old.metadata.resource_version;
            api.replace(&name, &PostParams::default(), &wanted).await?
        }
    };
    let status =
        object.get("status").filter(|status| status.as_object().is_some_and(|fields| !fields.is_empty()));
    let Some(status) = status else { return Ok(()) };
    if kept.data.get("status") == Some(status) || !resource(object)?.status {
        return Ok(());
    }
    // whole, not merged: what is not said is gone
    let mut wanted = kept;
    wanted.data["status"] = status.clone();
    api.replace_status(&name, &PostParams::default(), &wanted).await?;
    Ok(())
}

fn api(client: Client, object: &Value) -> Result<(Api<DynamicObject>, DynamicObject)> {
    let resource = resource(object)?;
    let kind = ApiResource {
        group: resource.group.to_owned(),
        version: resource.version.to_owned(),
        api_version: resource.api_version(),
        kind: resource.kind.to_owned(),
        plural: resource.plural.to_owned(),
    };
    let object: DynamicObject = serde_json::from_value(object.clone())?;
    let namespace = object.metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty());
    let api = match namespace {
        Some(namespace) if resource.namespaced => Api::namespaced_with(client, namespace, &kind),
        _ => Api::all_with(client, &kind),
    };
    Ok((api, object))
}

fn resource(object: &Value) -> Result<&'static Resource> {
    match Resource::of(object) {
        Some(resource) => Ok(resource),
        None => bail!("no such kind: {} {}", object["apiVersion"], object["kind"]),
    }
}

/// Without what only a server writes.
fn for_server(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in ["uid", "resourceVersion", "creationTimestamp"] {
            metadata.remove(field);
        }
    }
    object
}

fn describe(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    format!("{} {}/{}", text(&object["kind"]), text(&metadata["namespace"]), text(&metadata["name"]))
}
