"""The devboxes' tables. Room is left on a devbox's pages: claim and settle update its row many times."""

import django.contrib.postgres.indexes
import django.db.models.deletion
import django.db.models.functions.datetime
import flows.models
from django.db import migrations, models


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('accounts', '0001_initial'),
        ('hosts', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='Devbox',
            fields=[
                ('id', flows.models.IdField(primary_key=True, serialize=False)),
                ('created_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False)),
                ('completed_at', models.DateTimeField(blank=True, editable=False, null=True)),
                ('step', models.TextField()),
                ('step_since', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False)),
                ('attempts', models.IntegerField(db_default=0, editable=False)),
                ('wake_at', models.DateTimeField(blank=True, db_default=django.db.models.functions.datetime.Now(), editable=False, null=True)),
                ('wakes', models.IntegerField(db_default=0, editable=False)),
                ('lease', models.TextField(blank=True, editable=False, null=True)),
                ('lease_until', models.DateTimeField(blank=True, editable=False, null=True)),
                ('fence', models.BigIntegerField(db_default=0, editable=False)),
                ('deadline_at', models.DateTimeField(blank=True, editable=False, null=True)),
                ('error_code', models.TextField(blank=True, editable=False, null=True)),
                ('error_detail', models.TextField(blank=True, editable=False, null=True)),
                ('name', models.TextField(blank=True, default='')),
                ('metadata', models.JSONField(blank=True, default=dict)),
                ('wants', models.TextField(choices=[('running', 'Running'), ('suspended', 'Suspended'), ('shutdown', 'Shutdown')], default='running')),
                ('status', models.TextField(choices=[('provisioning', 'provisioning'), ('initializing', 'initializing'), ('running', 'running'), ('suspending', 'suspending'), ('suspended', 'suspended'), ('resuming', 'resuming'), ('failure', 'failure'), ('shutdown', 'shutdown')], default='provisioning')),
                ('seen', models.TextField(blank=True, default='', help_text='What its host last said of its box.')),
                ('seen_at', models.DateTimeField(blank=True, null=True)),
                ('reserved', models.BooleanField(default=False, help_text='Its size is promised to it on its host.')),
                ('slot', models.TextField(blank=True, default='', help_text='Its name on the host.')),
                ('address', models.TextField(blank=True, default='')),
                ('image_id', models.TextField(blank=True, default='')),
                ('architecture', models.TextField(default='x86_64')),
                ('cpu_millis', models.IntegerField()),
                ('memory_mb', models.IntegerField()),
                ('disk_mb', models.IntegerField()),
                ('launch_parameters', models.JSONField(default=dict, help_text='What was asked for, as the API shows it.')),
                ('environment_sealed', models.BinaryField(blank=True, null=True)),
                ('mounts_sealed', models.BinaryField(blank=True, null=True)),
                ('launch_commands', models.JSONField(blank=True, default=list)),
                ('entrypoint', models.TextField(blank=True, default='')),
                ('user_name', models.TextField(default='user')),
                ('user_uid', models.IntegerField(default=1000)),
                ('user_home', models.TextField(default='/home/user')),
                ('keep_alive_seconds', models.IntegerField()),
                ('end_at', models.DateTimeField(blank=True, help_text='When its keep-alive time is over.', null=True)),
                ('launch_total', models.IntegerField(default=0, help_text='How many pieces of launch work it has.')),
                ('launch_index', models.IntegerField(default=0, help_text='How many pieces of its launch work are done.')),
                ('started_at', models.DateTimeField(blank=True, help_text='When it was first running.', null=True)),
                ('last_activity_at', models.DateTimeField(blank=True, null=True)),
                ('ended_at', models.DateTimeField(blank=True, help_text='When its final status was decided.', null=True)),
                ('failure_reason', models.TextField(blank=True, null=True)),
                ('shutdown_reason', models.TextField(blank=True, null=True)),
                ('why', models.TextField(blank=True, default='', help_text='The cause of its end, in words.')),
                ('initiator_type', models.TextField(default='api')),
                ('initiator_id', models.TextField(blank=True, default='', help_text='The API key that made it.')),
                ('account', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name='devboxes', to='accounts.account')),
                ('host', models.ForeignKey(blank=True, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='devboxes', to='hosts.host')),
            ],
            options={
                'verbose_name_plural': 'devboxes',
                'abstract': False,
            },
        ),
        migrations.CreateModel(
            name='DevboxLog',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('source', models.TextField(help_text='setup_commands or entrypoint')),
                ('level', models.TextField(default='info')),
                ('execution_id', models.TextField(blank=True, default='')),
                ('cmd', models.TextField(blank=True, null=True)),
                ('message', models.TextField(blank=True, null=True)),
                ('exit_code', models.IntegerField(blank=True, null=True)),
                ('devbox', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='logs', to='devboxes.devbox')),
            ],
            options={
                'ordering': ['id'],
            },
        ),
        migrations.CreateModel(
            name='DevboxTransition',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('status', models.TextField()),
                ('at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('failure_reason', models.TextField(blank=True, null=True)),
                ('devbox', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='transitions', to='devboxes.devbox')),
            ],
            options={
                'ordering': ['id'],
            },
        ),
        migrations.AddIndex(
            model_name='devbox',
            index=models.Index(condition=models.Q(('wake_at__isnull', False)), fields=['wake_at'], name='devboxes_devbox_due'),
        ),
        migrations.AddIndex(
            model_name='devbox',
            index=models.Index(models.F('account'), models.OrderBy(models.F('created_at'), descending=True), models.OrderBy(models.F('id'), descending=True), name='devboxes_devbox_list'),
        ),
        migrations.AddIndex(
            model_name='devbox',
            index=models.Index(models.F('account'), models.OrderBy(models.F('created_at'), descending=True), models.OrderBy(models.F('id'), descending=True), condition=models.Q(('ended_at__isnull', True)), name='devboxes_devbox_live'),
        ),
        migrations.AddIndex(
            model_name='devbox',
            index=django.contrib.postgres.indexes.GinIndex(fields=['metadata'], name='devboxes_devbox_metadata', opclasses=['jsonb_path_ops']),
        ),
        migrations.AddConstraint(
            model_name='devbox',
            constraint=models.CheckConstraint(condition=models.Q(('step__in', ['place', 'prepare_disk', 'boot', 'launch', 'running', 'teardown', 'gone', 'clean_up', 'failed'])), name='devboxes_devbox_step'),
        ),
        migrations.AddConstraint(
            model_name='devbox',
            constraint=models.CheckConstraint(condition=models.Q(('status__in', ('provisioning', 'initializing', 'running', 'suspending', 'suspended', 'resuming', 'failure', 'shutdown'))), name='devboxes_devbox_status'),
        ),
        migrations.RunSQL(
            'ALTER TABLE devboxes_devbox SET (fillfactor = 70)', 'ALTER TABLE devboxes_devbox RESET (fillfactor)'
        ),
    ]
